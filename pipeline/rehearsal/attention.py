"""Attention as a fused kernel has it: reads queries, keys and values, keeps its result and one number a row for backward.

On the stand-in device PyTorch would take its plain products instead, whose scores no run on a GPU ever holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("moonlight::rehearsed_attention", mutates_args=())
def rehearsed_attention(q_BHSQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor) -> tuple[Tensor, Tensor]:
    """Result and log-sum-exp."""
    raise NotImplementedError("known by its shapes alone")


@rehearsed_attention.register_fake
def _(q_BHSQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor) -> tuple[Tensor, Tensor]:
    B, H, S, _ = q_BHSQ.shape
    o_BSHV = v_BHSV.new_empty(B, S, H, v_BHSV.shape[-1])
    return o_BSHV.transpose(1, 2), q_BHSQ.new_empty(B, H, S, dtype=torch.float32)


@torch.library.custom_op("moonlight::rehearsed_attention_backward", mutates_args=())
def rehearsed_attention_backward(
    grad: Tensor, q_BHSQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor, o: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("known by its shapes alone")


@rehearsed_attention_backward.register_fake
def _(
    grad: Tensor, q_BHSQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor, o: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_BHSQ), torch.empty_like(k_BHSQ), torch.empty_like(v_BHSV)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return rehearsed_attention_backward(grad, *ctx.saved_tensors)  # type: ignore[no-any-return]


rehearsed_attention.register_autograd(_backward, setup_context=_save)


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Takes the place of `torch.nn.functional`'s."""
    assert is_causal, "a run without document masks has no mask"
    out: Tensor = rehearsed_attention(q, k, v)[0]
    return out
