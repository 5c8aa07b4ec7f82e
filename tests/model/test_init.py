"""Initial weights depend on seed and name alone."""

import json
import os
import subprocess
import sys

import pytest
import torch

from pipeline.model import init
from pipeline.model.moonlight import Moonlight
from tests.model.oracle import small_config


def weights(config, seed):
    model = Moonlight(config)
    model.reset_parameters(seed)
    return dict(model.named_parameters())


def test_same_seed_same_weights_other_seed_other_weights():
    one, again, other = (weights(small_config(), seed) for seed in (0, 0, 1))
    for name, tensor in one.items():
        assert torch.equal(tensor, again[name]), name
        assert tensor.dim() == 1 or not torch.equal(tensor, other[name]), name


def test_neither_depth_nor_the_number_of_experts_changes_what_a_parameter_gets():
    small = weights(small_config(), 0)
    large = weights(small_config(num_hidden_layers=5, n_routed_experts=12), 0)
    assert torch.equal(small["layers.1.self_attn.q_proj.weight"], large["layers.1.self_attn.q_proj.weight"])
    assert torch.equal(small["layers.1.mlp.experts.up_proj"], large["layers.1.mlp.experts.up_proj"][:8])


def test_deviation_gains_and_buffers():
    config = small_config(hidden_size=256, vocab_size=512, initializer_range=0.02)
    model = Moonlight(config)
    for name, tensor in model.named_parameters():
        if tensor.dim() == 1:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        elif tensor.numel() > 10_000:
            assert abs(tensor.std().item() / 0.02 - 1) < 0.05, name
            assert abs(tensor.mean().item()) < 1e-3, name
    for _, router in model.routers():
        assert not router.e_score_correction_bias.any()
        assert not router.tokens_per_expert.any()


def test_a_model_from_the_meta_device_is_the_same_model():
    with torch.device("meta"):
        model = Moonlight(small_config())
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    model.reset_parameters(4)
    expected = weights(small_config(), 4)
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    assert torch.equal(model.layers[1].self_attn.max_logits, torch.full((2,), -torch.inf))
    assert not model.layers[1].mlp.router.tokens_per_expert.any()


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this processor has the plain kernels only"
)
def test_a_processor_without_vector_units_draws_the_same_up_to_rounding():
    """Initial weights of a run that starts on another kind of machine; the bits are not promised."""
    program = "import torch; from pipeline.model.init import _normal; print(_normal((40, 30), 0.02, '5/x').flatten().tolist())"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    plain = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout
    ours = init._normal((40, 30), 0.02, "5/x").flatten().tolist()
    assert json.loads(plain) == pytest.approx(ours, rel=1e-5, abs=1e-7)
