"""Causal attention for CPUs from batched matrix products, for sequences short enough to keep their probabilities.

Rows of queries are taken in chunks of CHUNK; a chunk meets only the keys up to its own end, so of the S x S pairs hardly
more than the causal half is computed. The probabilities of a chunk are kept for backward, which then needs no
recomputation: forward and backward are 2 + 4 products. PyTorch's fused CPU kernel multiplies small tiles, wants values
as wide as queries and recomputes; at S = 512 this is 1.7 times as fast, at 2048 1.3 times (one thread, fp32).

Memory: H * S * (S + CHUNK) / 2 numbers a sequence, half of what an unfused implementation keeps. Beyond LONGEST
tokens `attention.attend` takes the fused kernel, which keeps none.

Two operators (forward, backward) so that torch.compile and activation checkpointing see one node each.

Legend: B rows, H heads, S tokens, Q query/key width, V value width, T keys seen by a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK = 64  # query rows at a time: scores of one sequence's heads stay in the second-level cache
LONGEST = 2048  # tokens


def causal_attention(q_BHSQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor, scale: float, mask_B1SS: Tensor | None) -> Tensor:
    """softmax(q k^T * scale) v -> o_BHSV. `mask_B1SS`: True where a query may look; None: at itself and before.

    A mask must be causal and let every query see itself.
    """
    out: Tensor = _forward(q_BHSQ.contiguous(), k_BHSQ.contiguous(), v_BHSV.contiguous(), scale, mask_B1SS)[0]
    return out


def _chunks(B: int, H: int, S: int) -> Iterator[tuple[int, slice, int, slice]]:
    """(row of the batch, query rows, keys seen, place of the probabilities in the flat buffer)."""
    start = 0
    for b in range(B):
        for first in range(0, S, CHUNK):
            end = min(first + CHUNK, S)
            size = H * (end - first) * end
            yield b, slice(first, end), end, slice(start, start + size)
            start += size


def _probabilities(B: int, H: int, S: int) -> int:
    whole, rest = divmod(S, CHUNK)
    return B * H * (CHUNK * CHUNK * whole * (whole + 1) // 2 + rest * S)


@torch.library.custom_op("moonlight::causal_attention", mutates_args=())
def _forward(
    q_BHSQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor, scale: float, mask_B1SS: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, H, S, _ = q_BHSQ.shape
    out_BHSV = torch.empty_like(v_BHSV)
    flat = q_BHSQ.new_empty(_probabilities(B, H, S))
    future = q_BHSQ.new_full((CHUNK, CHUNK), -torch.inf).triu_(1)
    for b, rows, T, place in _chunks(B, H, S):
        count = rows.stop - rows.start
        logits_HCT = torch.bmm(q_BHSQ[b, :, rows] * scale, k_BHSQ[b, :, :T].transpose(1, 2))
        if mask_B1SS is None:
            logits_HCT[:, :, rows] += future[:count, :count]
        else:
            logits_HCT.masked_fill_(~mask_B1SS[b, :, rows, :T], -torch.inf)
        weights_HCT = flat[place].view(H, count, T)
        torch.softmax(logits_HCT, -1, out=weights_HCT)
        out_BHSV[b, :, rows] = torch.bmm(weights_HCT, v_BHSV[b, :, :T])
    return out_BHSV, flat


@torch.library.custom_op("moonlight::causal_attention_backward", mutates_args=())
def _backward(
    grad_BHSV: Tensor, q_BHSQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor, flat: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, S, _ = q_BHSQ.shape
    grad_q, grad_k, grad_v = torch.empty_like(q_BHSQ), torch.zeros_like(k_BHSQ), torch.zeros_like(v_BHSV)
    for b, rows, T, place in _chunks(B, H, S):
        weights_HCT = flat[place].view(H, rows.stop - rows.start, T)
        grad_HCV = grad_BHSV[b, :, rows]
        grad_v[b, :, :T].baddbmm_(weights_HCT.transpose(1, 2), grad_HCV)
        grad_weights_HCT = torch.bmm(grad_HCV, v_BHSV[b, :, :T].transpose(1, 2))
        grad_logits_HCT = torch._softmax_backward_data(grad_weights_HCT, weights_HCT, -1, weights_HCT.dtype)
        grad_q[b, :, rows] = torch.bmm(grad_logits_HCT, k_BHSQ[b, :, :T])
        grad_k[b, :, :T].baddbmm_(grad_logits_HCT.transpose(1, 2), q_BHSQ[b, :, rows], alpha=scale)
    return grad_q.mul_(scale), grad_k, grad_v


@_forward.register_fake
def _(q_BHSQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor, scale: float, mask_B1SS: Tensor | None) -> tuple[Tensor, Tensor]:
    B, H, S, _ = q_BHSQ.shape
    return torch.empty_like(v_BHSV), q_BHSQ.new_empty(_probabilities(B, H, S))


@_backward.register_fake
def _(
    grad_BHSV: Tensor, q_BHSQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor, flat: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_BHSQ), torch.empty_like(k_BHSQ), torch.empty_like(v_BHSV)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float, Tensor | None], output: tuple[Tensor, Tensor]) -> None:
    q_BHSQ, k_BHSQ, v_BHSV, ctx.scale, _ = inputs
    ctx.set_materialize_grads(False)  # the probabilities have no gradient; zeros in their place would cost a pass
    ctx.save_for_backward(q_BHSQ, k_BHSQ, v_BHSV, output[1])


def _differentiate(ctx: Any, grad_BHSV: Tensor, grad_flat: None) -> tuple[Tensor, Tensor, Tensor, None, None]:
    q_BHSQ, k_BHSQ, v_BHSV, flat = ctx.saved_tensors
    return *_backward(grad_BHSV.contiguous(), q_BHSQ, k_BHSQ, v_BHSV, flat, ctx.scale), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
