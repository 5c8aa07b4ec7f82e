"""A SwiGLU MLP in two parts with gradients by hand, so that each part can run behind another exchange of rows.

`first` multiplies gate and up, `finish` does the rest and is the whole MLP to autograd: its backward computes all gradients, in
one node, wherever `first` ran. Kept for backward are the input, gate and up; hidden numbers are made again with the activation's
gradients (pipeline/kernels/activation.py). No node of autograd's own, no graph of a compiler: five products and one kernel.

Legend: M rows, D hidden, F width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from pipeline.kernels.activation import swiglu, swiglu_backward
from pipeline.model.matmul import is_cpu_fp32, outer, product


@torch.no_grad()
def first(x: Tensor, gate_FD: Tensor, up_FD: Tensor) -> tuple[Tensor, Tensor]:
    """(gate_MF, up_MF) of x [..., D]."""
    x_MD = x.reshape(-1, x.shape[-1])
    return product(x_MD, gate_FD), product(x_MD, up_FD)


def finish(x: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, gate_MF: Tensor, up_MF: Tensor) -> Tensor:
    """down(silu(gate x) * up x), given what `first` made of the same x and weights; shaped as x."""
    return cast(Tensor, _MLP.apply(x, gate_FD, up_FD, down_DF, gate_MF, up_MF))


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, gate_MF: Tensor, up_MF: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, gate_FD, up_FD, down_DF, gate_MF, up_MF)
        return product(swiglu(gate_MF, up_MF, None), down_DF).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        x, gate_FD, up_FD, down_DF, gate_MF, up_MF = ctx.saved_tensors
        x_MD, grad_MD, width = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]), gate_MF.shape[1]
        grad_hidden_MF = product(grad_MD, down_DF.T)
        grad_M2F, hidden_MF, _ = swiglu_backward(grad_hidden_MF, gate_MF, up_MF, None)
        grad_down_DF = outer(grad_MD, hidden_MF)
        if is_cpu_fp32(x):  # two sums of fp32 are no worse than one, and nothing is laid end to end
            halves = grad_M2F[:, :width], grad_M2F[:, width:]
            grad_gate_FD, grad_up_FD = (outer(half_MF, x_MD) for half_MF in halves)
            grad_x_MD = product(halves[0], gate_FD.T).add_(product(halves[1], up_FD.T))
        else:
            grad_gate_FD, grad_up_FD = outer(grad_M2F, x_MD).chunk(2)
            grad_x_MD = grad_M2F @ torch.cat([gate_FD, up_FD])
        return grad_x_MD.view(x.shape), grad_gate_FD, grad_up_FD, grad_down_DF, None, None
