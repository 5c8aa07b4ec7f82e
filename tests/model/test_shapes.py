"""Every network that the configuration accepts can be built, has the shapes that arithmetic says, and trains."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.config.load import load_config, preset_names
from pipeline.config.schema import ModelConfig
from pipeline.evaluation.weights import empty_model
from pipeline.model.moonlight import Moonlight
from pipeline.model.shapes import parameter_shapes

WIDTHS = {
    "hidden_size": st.integers(1, 40),
    "num_attention_heads": st.integers(1, 3),
    "kv_lora_rank": st.integers(1, 9),
    "qk_nope_head_dim": st.integers(1, 9),
    "qk_rope_head_dim": st.integers(1, 8),
    "v_head_dim": st.integers(1, 9),
    "intermediate_size": st.integers(1, 20),
    "moe_intermediate_size": st.integers(1, 24),
    "n_routed_experts": st.integers(1, 5),
    "n_shared_experts": st.integers(1, 3),
    "num_experts_per_tok": st.integers(1, 3),
    "num_hidden_layers": st.integers(1, 3),
    "first_k_dense_replace": st.integers(0, 3),
}


@st.composite
def accepted(draw: st.DrawFn) -> ModelConfig:
    """Drawn at large half of the time; else with what the schema wants of widths, so that most are accepted."""
    drawn = {name: draw(width) for name, width in WIDTHS.items()}
    if draw(st.booleans()):
        for name in ("hidden_size", "moe_intermediate_size"):
            drawn[name] = 8 * draw(st.integers(1, 4))
        drawn["qk_rope_head_dim"] = 2 * draw(st.integers(1, 4))
    try:
        return ModelConfig(vocab_size=draw(st.integers(2, 50)), **drawn)
    except ValidationError:
        return draw(accepted())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(config=accepted())
def test_what_is_accepted_can_be_built_and_trained(config: ModelConfig) -> None:
    model = Moonlight(config)
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == parameter_shapes(config)
    model.reset_parameters(0)
    ids = torch.arange(10).view(2, 5) % config.vocab_size
    out = model(ids, ids)
    out.loss_sum.backward()
    assert out.loss_sum.isfinite()
    assert all(each.grad is not None for name, each in model.named_parameters() if "experts" not in name)


@pytest.mark.parametrize("preset", preset_names())
def test_the_presets(preset: str) -> None:
    config = load_config(preset).model
    meta = empty_model(config)
    shapes = parameter_shapes(config)
    assert list(shapes.items()) == [(name, tuple(parameter.shape)) for name, parameter in meta.named_parameters()]
