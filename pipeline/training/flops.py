"""Model FLOPs of a training token, the numerator of MFU.

Forward and backward: 6 FLOPs for every parameter a token passes through (experts: only the chosen ones; the head
counts, the embedding look-up does not) plus causal attention, 3 * layers * sequence * heads * (query width + value
width). Recomputation, the router's selection and the optimizer are not counted. At 4096 tokens the real model needs
17.17 GFLOP a token, at 8192 tokens 18.87: the figure behind 386.6 TFLOP/s at 22,528 tokens/s, as Megatron-Bridge's
verification card of Moonlight counts.
"""

from __future__ import annotations

import math

from pipeline.config.schema import ModelConfig

# TFLOP/s of dense bf16 products by the makers' data sheets, by what the driver calls the processor; the first that fits
PEAKS = {
    "GB300": 2500.0, "B300": 2250.0, "GB200": 2500.0, "B200": 2250.0, "GH200": 989.4, "H200 NVL": 835.0, "H200": 989.4,
    "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.4, "H800": 989.4, "H20": 148.0, "A100": 312.0, "A800": 312.0, "L40S": 362.0,
    "MI355X": 2516.6, "MI350X": 2306.9, "MI325X": 1307.4, "MI300X": 1307.4,
}  # fmt: skip


def peak_flops(processor: str) -> float:
    """FLOP/s that one processor of this name could do, by which MFU counts; NaN for one that is not in the table."""
    return next((1e12 * peak for name, peak in PEAKS.items() if name in processor), math.nan)


def active_parameters(config: ModelConfig) -> int:
    """Parameters one token passes through, without embedding and head."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    attention = (
        hidden * heads * config.qk_head_dim
        + hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
        + config.kv_lora_rank
        + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
        + heads * config.v_head_dim * hidden
    )
    dense = 3 * hidden * config.intermediate_size
    experts = 3 * hidden * config.moe_intermediate_size * (config.num_experts_per_tok + config.n_shared_experts)
    moe = experts + config.n_routed_experts * hidden
    layers, dense_layers = config.num_hidden_layers, config.first_k_dense_replace
    return layers * (attention + 2 * hidden) + dense_layers * dense + (layers - dense_layers) * moe + hidden


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """FLOPs of forward and backward for one token of a causal sequence."""
    matmuls = 6 * (active_parameters(config) + config.vocab_size * config.hidden_size)
    widths = config.qk_head_dim + config.v_head_dim
    return matmuls + 3 * config.num_hidden_layers * sequence_length * config.num_attention_heads * widths
