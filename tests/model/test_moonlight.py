"""The whole network against transformers' DeepseekV3ForCausalLM: same weights, same logits, loss and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.load import load_config
from pipeline.model.moonlight import Moonlight
from tests.model.oracle import gradients_as_oracle, oracle_gradients, oracle_of, random_model, small_config

TOLERANCE = 1e-5  # relative, fp32


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)).item()


@st.composite
def configs(draw):
    experts = draw(st.integers(2, 9))
    layers = draw(st.integers(1, 3))
    return small_config(
        hidden_size=draw(st.sampled_from([32, 48, 64])),
        num_hidden_layers=layers,
        first_k_dense_replace=draw(st.integers(0, layers)),
        num_attention_heads=draw(st.integers(1, 4)),
        kv_lora_rank=draw(st.integers(8, 24)),
        qk_nope_head_dim=draw(st.integers(4, 20)),
        qk_rope_head_dim=2 * draw(st.integers(2, 6)),
        v_head_dim=draw(st.integers(4, 28)),
        intermediate_size=draw(st.integers(8, 64)),
        moe_intermediate_size=8 * draw(st.integers(1, 5)),
        n_routed_experts=experts,
        num_experts_per_tok=draw(st.integers(1, experts)),
        n_shared_experts=draw(st.integers(1, 3)),
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.446])),
        rope_theta=draw(st.sampled_from([1e4, 5e4])),
        initializer_range=draw(st.sampled_from([0.02, 0.1])),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(config=configs(), seed=st.integers(0, 1000), length=st.integers(8, 33))
def test_logits_loss_and_gradients_equal_transformers(config, seed, length):
    model = random_model(config, seed)
    oracle = oracle_of(model)
    ids = torch.randint(0, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.roll(-1, dims=1)
    labels[:, -1] = -100

    theirs = oracle(ids, use_cache=False).logits
    assert relative_error(model(ids), theirs) < TOLERANCE

    their_loss = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), labels.flatten(), reduction="sum")
    (their_loss / 7).backward()
    out = model(ids, labels)
    (out.loss_sum / 7).backward()
    assert out.num_tokens == (labels != -100).sum()
    assert out.loss_sum.item() == pytest.approx(their_loss.item(), rel=TOLERANCE)
    expected = oracle_gradients(oracle)
    ours = gradients_as_oracle(model)
    assert ours.keys() == expected.keys()
    scale = max(gradient.norm().item() for gradient in expected.values())
    for name, gradient in expected.items():
        if gradient is None:  # transformers leaves it out where no gradient flows
            assert ours[name].norm() == 0, name
        else:  # plus what fp32 rounding makes of the largest gradient where this one is a difference of large terms
            assert (ours[name] - gradient).norm() <= TOLERANCE * gradient.norm() + 1e-8 * scale, name


def test_published_parameter_counts_on_the_meta_device():
    config = load_config("moonlight-16b-a3b").model
    with torch.device("meta"):
        model = Moonlight(config)
    parameters = dict(model.named_parameters())
    total = sum(p.numel() for p in parameters.values())
    embeddings = parameters["embed_tokens.weight"].numel() + parameters["lm_head.weight"].numel()
    experts = sum(p.numel() for p in parameters.values() if p.dim() == 3)
    active = (
        total - embeddings - experts * (config.n_routed_experts - config.num_experts_per_tok) // config.n_routed_experts
    )
    assert total == 15_960_108_544
    assert active == 2_243_685_888


def test_documents_of_a_row_are_as_if_run_alone():
    model = random_model(small_config())
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    documents = [[7, 20, 9], [31]]  # the rest of each row is padding
    logits = model(ids, doc_lens=documents)
    for row, lengths in enumerate(documents):
        start = 0
        for length in lengths:
            alone = model(ids[row : row + 1, start : start + length])
            torch.testing.assert_close(logits[row, start : start + length], alone[0], rtol=1e-4, atol=1e-5)
            start += length


def test_document_lengths_that_do_not_fit_are_refused():
    model = random_model(small_config())
    ids = torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"doc_lens\[0\].*at most the row's 8 tokens"):
        model(ids, doc_lens=[[5, 4]])
    with pytest.raises(ValueError, match="one list of lengths a row"):
        model(ids, doc_lens=[[5], [4]])
