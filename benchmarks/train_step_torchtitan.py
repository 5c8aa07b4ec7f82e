"""The peer torchtitan of `train_step`: its DeepSeek-V3 model with the sizes of a Moonlight, on a CPU.

torchtitan 0.3.0 is built for GPUs; this uses what of it runs without: its model, its chunked loss (the default of its
DeepSeek-V3 configurations: the head is applied to an eighth of the sequence at a time) and its fused AdamW.

Attention  `ScaledDotProductAttention`, its class around `F.scaled_dot_product_attention`, with causal masks. The backends of its
           language-model configurations do not train on a CPU: FlexAttention has no backward there and the varlen
           kernel is CUDA's.
Experts    `GroupedExperts` casts to bf16 and multiplies in groups, whatever the dtype of the weights: as it is, and with
           the same lines in fp32, which is what everybody else computes here.
Muon       its `DistMuon` takes CUDA devices only, so `torch.optim.Muon` gets views of the matrices, as it does for
           transformers.
Dispatch   `LocalTokenDispatcher`, what its all-to-all dispatcher falls back to on one rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.schema import ModelConfig

RENAMED = (
    ("embed_tokens.", "tok_embeddings."),
    ("self_attn.q_proj.", "attention.wq."),
    ("self_attn.kv_a_proj_with_mqa.", "attention.wkv_a."),
    ("self_attn.kv_a_layernorm.", "attention.kv_norm."),
    ("self_attn.kv_b_proj.", "attention.wkv_b."),
    ("self_attn.o_proj.", "attention.wo."),
    ("input_layernorm.", "attention_norm."),
    ("post_attention_layernorm.", "ffn_norm."),
    ("mlp.router.e_score_correction_bias", "moe.expert_bias_E"),
    ("mlp.router.", "moe.router.gate."),
    ("mlp.experts.gate_proj", "moe.routed_experts.inner_experts.w1_EFD"),
    ("mlp.experts.up_proj", "moe.routed_experts.inner_experts.w3_EFD"),
    ("mlp.experts.down_proj", "moe.routed_experts.inner_experts.w2_EDF"),
    ("mlp.shared_experts.", "moe.shared_experts."),
    ("mlp.", "feed_forward."),
    ("gate_proj.", "w1."),
    ("up_proj.", "w3."),
    ("down_proj.", "w2."),
)


def torchtitan_name(name: str) -> str:
    """The name of our parameter in torchtitan's model."""
    for ours, theirs in RENAMED:
        name = name.replace(ours, theirs)
    return name


def build(config: ModelConfig, length: int, experts_dtype: torch.dtype) -> Any:
    """torchtitan's model with the sizes of `config`, uninitialised."""
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.moe import GroupedExperts
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher
    from torchtitan.models.deepseek_v3 import DeepSeekV3Model, build_mla_moe_layers

    init: dict[str, Any] = {"weight": nn.init.zeros_}  # replaced by our weights
    norm = partial(RMSNorm.Config, normalized_shape=config.hidden_size, eps=config.rms_norm_eps, param_init=init)
    layers = build_mla_moe_layers(
        n_layers=config.num_hidden_layers,
        n_dense_layers=config.first_k_dense_replace,
        dim=config.hidden_size,
        n_heads=config.num_attention_heads,
        q_lora_rank=0,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        mscale=1.0,
        dense_hidden_dim=config.intermediate_size,
        moe_hidden_dim=config.moe_intermediate_size,
        num_experts=config.n_routed_experts,
        num_shared_experts=config.n_shared_experts,
        router_top_k=config.num_experts_per_tok,
        router_score_func="sigmoid",
        router_route_scale=config.routed_scaling_factor,
        router_route_norm=True,
        attn_backend="varlen",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
        linear_init=init,
        norm_init=init,
        depth_init=lambda layer: init,
        depth_experts_init=lambda layer: {},
        rope=ComplexRoPE.Config(dim=config.qk_rope_head_dim, max_seq_len=length, theta=config.rope_theta),
    )

    class Fp32Experts(GroupedExperts):  # type: ignore[misc]
        """The same three products without the casts."""

        def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
            product = partial(F.grouped_mm, offs=counts_E.cumsum(0, dtype=torch.int32))
            gate_RF, up_RF = (product(x_RD, w_EFD.mT) for w_EFD in (self.w1_EFD, self.w3_EFD))
            return product(F.silu(gate_RF) * up_RF, self.w2_EDF.mT)

    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
        for each in (layer.attention_norm, layer.ffn_norm, layer.attention.kv_norm):
            each.eps = config.rms_norm_eps
        if layer.moe is not None:
            routed = layer.moe.routed_experts
            routed.token_dispatcher = LocalTokenDispatcher.Config(
                num_experts=config.n_routed_experts, top_k=config.num_experts_per_tok
            )
    table = {"num_embeddings": config.vocab_size, "embedding_dim": config.hidden_size}
    head = {"in_features": config.hidden_size, "out_features": config.vocab_size}
    model = DeepSeekV3Model.Config(
        dim=config.hidden_size,
        vocab_size=config.vocab_size,
        tok_embeddings=Embedding.Config(**table, param_init=init),
        norm=norm(),
        lm_head=Linear.Config(**head, param_init=init),
        layers=layers,
        mtp_layers=[],
    ).build()
    if experts_dtype == torch.float32:
        for module in model.modules():
            if isinstance(module, GroupedExperts):
                module.__class__ = Fp32Experts
    return model
