"""One transformer layer: x += attention(norm(x)); x += feed-forward(norm(x)). Pre-norm, no biases, no dropout.

A block is the unit of FSDP wrapping, of torch.compile (`block.compile()`) and of activation checkpointing. The latter
is a setting of the block, not a wrapper, so that parameter names never change and FSDP's hooks stay outside of what is
recomputed:

- "none": every intermediate is kept for backward.
- "selective": outputs of matmuls and attention are kept; norms, activations, permutations and exchanges are redone.
- "full": only the block's input is kept; backward runs the block again.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pipeline.config.schema import ModelConfig
from pipeline.model.attention import Attention
from pipeline.model.experts import MLP, MoE
from pipeline.model.norm import RMSNorm
from pipeline.model.sequences import SequenceLayout

aten = torch.ops.aten
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    torch.ops.moonlight.linear.default,
    torch.ops.moonlight.grouped_rows.default,
    torch.ops.moonlight.causal_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}


class BlockOutput(NamedTuple):
    x_BSD: Tensor
    aux_loss: Tensor | None  # None: a dense layer
    tokens_per_expert_E: Tensor | None


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, aux_loss_weight: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: MLP | MoE
        if layer < config.first_k_dense_replace:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)
        else:
            self.mlp = MoE(config, aux_loss_weight)
        self.activation_checkpointing: Literal["none", "selective", "full"] = "none"

    def forward(self, x_BSD: Tensor, layout: SequenceLayout) -> BlockOutput:
        if self.activation_checkpointing == "none" or not torch.is_grad_enabled():
            return self._run(x_BSD, layout)
        if self.activation_checkpointing == "full":
            return checkpoint(self._run, x_BSD, layout, use_reentrant=False, preserve_rng_state=False)
        contexts = functools.partial(create_selective_checkpoint_contexts, _keep_matmuls)
        return checkpoint(self._run, x_BSD, layout, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    def _run(self, x_BSD: Tensor, layout: SequenceLayout) -> BlockOutput:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), layout)
        normed_BSD = self.post_attention_layernorm(x_BSD)
        if isinstance(self.mlp, MLP):
            return BlockOutput(x_BSD + self.mlp(normed_BSD), None, None)
        out = self.mlp(normed_BSD)
        return BlockOutput(x_BSD + out.x_BSD, out.aux_loss, out.tokens_per_expert_E)


def _keep_matmuls(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
