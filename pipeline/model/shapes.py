"""Names and shapes of the network's parameters as arithmetic: asked before anything is started, where torch's seconds and 150 MB
would be felt. A property test builds drawn networks and compares (tests/model/test_shapes.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.config.schema import ModelConfig

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ParameterCount:
    total: int
    active: int  # used by one token: all but the experts it is not sent to


def parameter_shapes(config: ModelConfig) -> Shapes:
    """As `Moonlight(config).named_parameters()` has them, in its order."""
    D, V = config.hidden_size, config.vocab_size
    found: Shapes = {"embed_tokens.weight": (V, D)}
    for index in range(config.num_hidden_layers):
        inner = _attention(config) | _feed_forward(config, moe=index >= config.first_k_dense_replace)
        found |= {f"layers.{index}.{name}": shape for name, shape in inner.items()}
    return found | {"norm.weight": (D,), "lm_head.weight": (V, D)}


def count_parameters(config: ModelConfig) -> ParameterCount:
    sizes = {name: math.prod(shape) for name, shape in parameter_shapes(config).items()}
    total = sum(sizes.values())
    experts = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    return ParameterCount(total, total - experts + experts * config.num_experts_per_tok // config.n_routed_experts)


def _attention(config: ModelConfig) -> Shapes:
    D, H, C = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    return {
        "input_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (H * config.qk_head_dim, D),
        "self_attn.kv_a_proj_with_mqa.weight": (C + config.qk_rope_head_dim, D),
        "self_attn.kv_a_layernorm.weight": (C,),
        "self_attn.kv_b_proj.weight": (H * (config.qk_nope_head_dim + config.v_head_dim), C),
        "self_attn.o_proj.weight": (D, H * config.v_head_dim),
        "post_attention_layernorm.weight": (D,),
    }


def _feed_forward(config: ModelConfig, *, moe: bool) -> Shapes:
    if not moe:
        return _mlp("mlp", config.hidden_size, config.intermediate_size)
    D, E, F = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    return {
        "mlp.router.weight": (E, D),
        "mlp.experts.gate_proj": (E, F, D),
        "mlp.experts.up_proj": (E, F, D),
        "mlp.experts.down_proj": (E, D, F),
        **_mlp("mlp.shared_experts", D, config.shared_intermediate_size),
    }


def _mlp(name: str, hidden: int, inner: int) -> Shapes:
    return {
        f"{name}.gate_proj.weight": (inner, hidden),
        f"{name}.up_proj.weight": (inner, hidden),
        f"{name}.down_proj.weight": (hidden, inner),
    }
