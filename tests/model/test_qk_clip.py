"""QK-clip shrinks the logits of the heads above the threshold by gamma and leaves everything else alone."""

import pytest
import torch

from pipeline.model.qk_clip import observe_max_logits, qk_clip_, take_max_logits
from tests.model.oracle import random_model, small_config

IDS = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))


def observed(model):
    observe_max_logits(model, True)
    model(IDS)
    observe_max_logits(model, False)
    return take_max_logits(model)


def test_logits_of_clipped_heads_fall_to_the_threshold():
    model = random_model(small_config(first_k_dense_replace=1, num_hidden_layers=1))
    before = observed(model)
    assert before.shape == (1, 2)
    low, high = before[0].sort().values.tolist()
    threshold = (low + high) / 2  # one head above, one below
    assert qk_clip_(model, before, threshold) == 1
    after = observed(model)  # the first layer's input has not changed, so its logits scale exactly
    expected = torch.where(before > threshold, threshold, before)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)


def test_values_rotary_keys_and_other_heads_stay():
    model, original = random_model(small_config()), random_model(small_config())
    gamma = 0.25
    qk_clip_(model, torch.tensor([[1.0, 1.0], [1.0, 400.0], [1.0, 1.0]]), 100.0)
    attention, before = model.layers[1].self_attn, original.layers[1].self_attn
    q, q0 = attention.q_proj.weight.view(2, 24, 64), before.q_proj.weight.view(2, 24, 64)
    kv, kv0 = attention.kv_b_proj.weight.view(2, 36, 24), before.kv_b_proj.weight.view(2, 36, 24)
    assert torch.equal(q[0], q0[0])
    assert torch.equal(kv[0], kv0[0])
    torch.testing.assert_close(q[1, :16], q0[1, :16] * gamma**0.5)
    torch.testing.assert_close(q[1, 16:], q0[1, 16:] * gamma)
    torch.testing.assert_close(kv[1, :16], kv0[1, :16] * gamma**0.5)
    assert torch.equal(kv[1, 16:], kv0[1, 16:])
    changed = {n for (n, p), p0 in zip(model.named_parameters(), original.parameters()) if not torch.equal(p, p0)}
    assert changed == {"layers.1.self_attn.q_proj.weight", "layers.1.self_attn.kv_b_proj.weight"}


def test_nothing_observed_or_not_finite_clips_nothing():
    model, original = random_model(small_config()), random_model(small_config())
    logits = take_max_logits(model)
    assert torch.equal(logits, torch.full((3, 2), -torch.inf))
    logits[0] = torch.tensor([torch.nan, torch.inf])
    assert qk_clip_(model, logits, 100.0) == 0
    assert all(torch.equal(p, p0) for p, p0 in zip(model.parameters(), original.parameters()))
    with pytest.raises(ValueError, match="threshold -1 must be positive"):
        qk_clip_(model, logits, -1)


def test_observing_changes_no_output_and_is_off_unless_asked():
    model = random_model(small_config())
    plain = model(IDS)
    assert torch.equal(take_max_logits(model), torch.full((3, 2), -torch.inf))
    observe_max_logits(model, True)
    assert torch.equal(model(IDS), plain)
