"""The SwiGLU kernels; what they compute: activation.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 4, 512  # of a program's tile


def swiglu(gate_MF: Tensor, up_MF: Tensor, weights_M: Tensor | None, end: Tensor | None = None) -> Tensor:
    gate_MF, up_MF = gate_MF.contiguous(), up_MF.contiguous()
    hidden_MF = torch.empty_like(gate_MF)
    M, F = gate_MF.shape
    if gate_MF.numel():
        grid = (triton.cdiv(M, ROWS), triton.cdiv(F, COLUMNS))
        _forward[grid](
            gate_MF, up_MF, weights_M, end, hidden_MF, M, F, weights_M is not None, end is not None, ROWS, COLUMNS
        )
    return hidden_MF


def swiglu_backward(
    grad_MF: Tensor, gate_MF: Tensor, up_MF: Tensor, weights_M: Tensor | None, end: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    grad_MF, gate_MF, up_MF = grad_MF.contiguous(), gate_MF.contiguous(), up_MF.contiguous()
    M, F = gate_MF.shape
    weighted = weights_M is not None
    grad_M2F, hidden_MF = gate_MF.new_empty(M, 2 * F), torch.empty_like(gate_MF)
    grad_weights_M = torch.zeros(M if weighted else 0, dtype=torch.float32, device=gate_MF.device)
    if gate_MF.numel():
        grid = (triton.cdiv(M, ROWS),)
        _backward[grid](
            grad_MF, gate_MF, up_MF, weights_M, end, grad_M2F, hidden_MF, grad_weights_M, M, F,
            weighted, end is not None, ROWS, COLUMNS,
        )  # fmt: skip
    return grad_M2F, hidden_MF, grad_weights_M


@triton.jit
def _forward(
    gate, up, weights, end, hidden, M, F,
    WEIGHTED: tl.constexpr, BOUNDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if BOUNDED:
        M = tl.minimum(M, tl.load(end).to(tl.int32))
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < M)[:, None] & (column < F)[None, :]
    at = row[:, None] * F + column[None, :]
    g = tl.load(gate + at, inside, 0.0).to(tl.float32)
    h = g * tl.sigmoid(g) * tl.load(up + at, inside, 0.0).to(tl.float32)
    if WEIGHTED:
        h = h * tl.load(weights + row, row < M, 0.0)[:, None]
    tl.store(hidden + at, h.to(hidden.dtype.element_ty), inside)


@triton.jit
def _backward(
    grad, gate, up, weights, end, grad_both, hidden, grad_weights, M, F,
    WEIGHTED: tl.constexpr, BOUNDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if BOUNDED:
        M = tl.minimum(M, tl.load(end).to(tl.int32))
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    if WEIGHTED:
        weight = tl.load(weights + row, row < M, 0.0)[:, None]
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, F, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (row < M)[:, None] & (column < F)[None, :]
        at = row[:, None] * F + column[None, :]
        d = tl.load(grad + at, inside, 0.0).to(tl.float32)
        g = tl.load(gate + at, inside, 0.0).to(tl.float32)
        u = tl.load(up + at, inside, 0.0).to(tl.float32)
        sigmoid = tl.sigmoid(g)
        silu = g * sigmoid
        h = silu * u
        if WEIGHTED:
            total += tl.sum(d * h, 1)
            h = h * weight
            d = d * weight
        both = row[:, None] * (2 * F) + column[None, :]
        grad_gate = d * u * (sigmoid + silu * (1 - sigmoid))
        tl.store(grad_both + both, grad_gate.to(grad_both.dtype.element_ty), inside)
        tl.store(grad_both + both + F, (d * silu).to(grad_both.dtype.element_ty), inside)
        tl.store(hidden + at, h.to(hidden.dtype.element_ty), inside)
    if WEIGHTED:
        tl.store(grad_weights + row, total, row < M)
