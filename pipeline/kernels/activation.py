"""SwiGLU between the products of an MLP: hidden = silu(gate) * up, of a routed expert times what the choice weighs.

Computed in fp32 and rounded once. Backward reads gate, up and the gradient once, and gives the gradients of both, laid out
as halves of one row for the products that follow, the hidden numbers again, which hence need not be kept, and the gradient of
the weights.

In a buffer that has room for more rows than there are, `end` says how many there are: kernels of our own pass over the others, whose
results hold anything, but for the gradients of their weights, which are zero either way.

Legend: M rows, F width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.kernels.choice import own_kernels


def swiglu(gate_MF: Tensor, up_MF: Tensor, weights_M: Tensor | None, end: Tensor | None = None) -> Tensor:
    """hidden_MF; `weights_M` fp32, `end` int [1]."""
    if own_kernels(gate_MF):
        return torch.ops.moonlight.swiglu(gate_MF, up_MF, weights_M, end)
    return plain_swiglu(gate_MF, up_MF, weights_M)


def swiglu_backward(
    grad_MF: Tensor, gate_MF: Tensor, up_MF: Tensor, weights_M: Tensor | None, end: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradients of gate and up [M, 2 F], hidden_MF, gradient of the weights [M] or [0])."""
    if own_kernels(gate_MF):
        return torch.ops.moonlight.swiglu_backward(grad_MF, gate_MF, up_MF, weights_M, end)
    grad_M2F, hidden_MF, grad_weights_M = plain_swiglu_backward(grad_MF, gate_MF, up_MF, weights_M)
    if end is not None:
        there_M = torch.arange(grad_weights_M.shape[0], device=end.device) < end
        grad_weights_M = grad_weights_M.where(there_M, 0.0)
    return grad_M2F, hidden_MF, grad_weights_M


def plain_swiglu(gate_MF: Tensor, up_MF: Tensor, weights_M: Tensor | None) -> Tensor:
    hidden_MF = F.silu(gate_MF.float()) * up_MF.float()
    return (hidden_MF if weights_M is None else hidden_MF * weights_M.unsqueeze(1)).to(gate_MF.dtype)


@torch.no_grad()
def plain_swiglu_backward(
    grad_MF: Tensor, gate_MF: Tensor, up_MF: Tensor, weights_M: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, width = gate_MF.dtype, gate_MF.shape[1]
    gate_MF, up_MF, grad_MF = gate_MF.float(), up_MF.float(), grad_MF.float()
    silu_MF = F.silu(gate_MF)
    hidden_MF = silu_MF * up_MF
    grad_weights_M = grad_MF.new_empty(0)
    if weights_M is not None:
        grad_weights_M = (grad_MF * hidden_MF).sum(1)
        hidden_MF = hidden_MF * weights_M.unsqueeze(1)
        grad_MF = grad_MF * weights_M.unsqueeze(1)
    grad_M2F = torch.empty(gate_MF.shape[0], 2 * width, dtype=dtype, device=gate_MF.device)
    grad_M2F[:, :width] = torch.ops.aten.silu_backward(grad_MF * up_MF, gate_MF)
    torch.mul(grad_MF, silu_MF, out=grad_M2F[:, width:])
    return grad_M2F, hidden_MF.to(dtype), grad_weights_M


@torch.library.custom_op("moonlight::swiglu", mutates_args=(), device_types="cuda")
def _swiglu(gate_MF: Tensor, up_MF: Tensor, weights_M: Tensor | None, end: Tensor | None) -> Tensor:
    from pipeline.kernels.activation_triton import swiglu

    return swiglu(gate_MF, up_MF, weights_M, end)


@_swiglu.register_fake
def _(gate_MF: Tensor, up_MF: Tensor, weights_M: Tensor | None, end: Tensor | None) -> Tensor:
    return torch.empty_like(gate_MF)


@torch.library.custom_op("moonlight::swiglu_backward", mutates_args=(), device_types="cuda")
def _swiglu_backward(
    grad_MF: Tensor, gate_MF: Tensor, up_MF: Tensor, weights_M: Tensor | None, end: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    from pipeline.kernels.activation_triton import swiglu_backward

    return swiglu_backward(grad_MF, gate_MF, up_MF, weights_M, end)


@_swiglu_backward.register_fake
def _(
    grad_MF: Tensor, gate_MF: Tensor, up_MF: Tensor, weights_M: Tensor | None, end: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = gate_MF.shape
    weights = 0 if weights_M is None else rows
    return (
        gate_MF.new_empty(rows, 2 * width),
        torch.empty_like(gate_MF),
        gate_MF.new_empty(weights, dtype=torch.float32),
    )
