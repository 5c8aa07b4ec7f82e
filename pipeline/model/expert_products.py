"""The products of routed experts with gradients by hand: rows to their experts, three products, weighted sums back.

Forward copies each row to its experts' places, multiplies, and sums up what comes out of them. Kept for backward are the rows, gate
and up, and where rows lie: copies of rows and hidden numbers are made again, a gather and a by-product of the activation's gradients.

Backward gives the rows their gradients first, for those travel on, and leaves those of the weights for later: `hold` is a node
that the weights pass through before the rows arrive; its own backward runs once the rows' gradients are on their way
(pipeline/parallel/flight.py says why then) and computes them behind that exchange.

Legend: R rows, C choices of each, M pairs, D hidden, F width, e experts here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pipeline.kernels.activation import swiglu, swiglu_backward
from pipeline.model.grouped import grouped_linear, grouped_outer
from pipeline.model.matmul import is_cpu_fp32
from pipeline.parallel.dispatch import Choices
from pipeline.parallel.rows import Filled, bag_sums, gathered, place

Gradients = tuple[Tensor, Tensor, Tensor]


class Later:
    """How to compute the gradients of the weights, once backward has been at their products. Refers to no node: no cycle."""

    gradients: Callable[[], Gradients] | None = None


class Held(NamedTuple):
    """The three stacks on their way to their products."""

    later: Later
    gate_eFD: Tensor
    up_eFD: Tensor
    down_eDF: Tensor


def hold(gate_eFD: Tensor, up_eFD: Tensor, down_eDF: Tensor) -> Held:
    """To be called where in backward the gradients of the weights shall be computed."""
    later = Later()
    return Held(later, *cast(Gradients, _Hold.apply(later, gate_eFD, up_eFD, down_eDF)))


class _Hold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, later: Later, *stacks: Tensor) -> tuple[Tensor, ...]:
        ctx.later = later
        return stacks

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        later: Later = ctx.later
        assert later.gradients is not None
        compute, later.gradients = later.gradients, None
        return None, *compute()


def expert_products(x_RD: Tensor, choices: Choices, held: Held) -> Tensor:
    """y_RD: the weighted sum of what each row's experts make of it."""
    return cast(Tensor, _Products.apply(x_RD, choices.weights_RC, choices, *held))


def _pairs(choices: Choices, experts: int) -> int:
    """How many places there are. A CPU knows at once how many pairs a bound is for: PyTorch computes an exponent at the end of an array,
    behind its last whole vector, to other bits than inside, so the array's length has to be that of what is in it."""
    if not choices.bounded or choices.experts_RC.device.type != "cpu":
        return choices.pairs
    return min(choices.pairs, int((choices.experts_RC < experts).sum()))


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, weights_RC: Tensor, choices: Choices, later: Later,
        gate_eFD: Tensor, up_eFD: Tensor, down_eDF: Tensor,
    ) -> Tensor:  # fmt: skip
        pairs = _pairs(choices, gate_eFD.shape[0])
        placing = place(choices.experts_RC, gate_eFD.shape[0], pairs, all_chosen=choices.all_chosen)
        offsets_e = placing.counts.cumsum(0).clamp(max=pairs).int()
        weights_M = weights_RC.flatten().index_select(0, placing.choice_M)
        if choices.bounded:
            weights_M.masked_fill_(placing.counts.sum() > choices.pairs, torch.nan)
        end = offsets_e[-1:] if choices.bounded else None
        filled = None if end is None else Filled(end, pairs)
        x_MD = gathered(x_RD, placing.row_M, filled)
        gate_MF, up_MF = grouped_linear(x_MD, gate_eFD, offsets_e), grouped_linear(x_MD, up_eFD, offsets_e)
        del x_MD
        y_MD = grouped_linear(swiglu(gate_MF, up_MF, weights_M, end), down_eDF, offsets_e)
        y_RD = bag_sums(y_MD, placing.place_M, placing.bags_R1)
        ctx.later, ctx.bounded = later, choices.bounded
        ctx.save_for_backward(
            x_RD, gate_MF, up_MF, weights_M, offsets_e,
            placing.row_M, placing.choice_M, placing.place_M, placing.bags_R1, gate_eFD, up_eFD, down_eDF,
        )  # fmt: skip
        ctx.choices_shape = weights_RC.shape
        return y_RD

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, Tensor, None, None, Tensor, Tensor, Tensor]:
        (
            x_RD, gate_MF, up_MF, weights_M, offsets_e, row_M, choice_M, place_M, bags_R1, gate_eFD, up_eFD, down_eDF,
        ) = ctx.saved_tensors  # fmt: skip
        pairs, width = gate_MF.shape
        end = offsets_e[-1:] if ctx.bounded else None
        filled = None if end is None else Filled(end, pairs)
        grad_MD = gathered(grad_RD.contiguous(), row_M, filled)
        grad_hidden_MF = grouped_linear(grad_MD, down_eDF, offsets_e, transpose=False)
        grad_M2F, hidden_MF, grad_weights_M = swiglu_backward(grad_hidden_MF, gate_MF, up_MF, weights_M, end)
        if is_cpu_fp32(x_RD):  # two sums of fp32 are no worse than one, and nothing is laid end to end
            grad_x_MD = grouped_linear(grad_M2F[:, :width], gate_eFD, offsets_e, transpose=False)
            grad_x_MD += grouped_linear(grad_M2F[:, width:], up_eFD, offsets_e, transpose=False)
        else:
            both_e2FD = torch.cat([gate_eFD, up_eFD], dim=1)
            grad_x_MD = grouped_linear(grad_M2F, both_e2FD, offsets_e, transpose=False)
        grad_x_RD = bag_sums(grad_x_MD, place_M, bags_R1)
        grad_weights = grad_weights_M.new_zeros(ctx.choices_shape.numel()).index_add_(0, choice_M, grad_weights_M)

        def weight_gradients() -> Gradients:
            x_MD = gathered(x_RD, row_M, filled)
            grad_down_eDF = grouped_outer(grad_MD, hidden_MF, offsets_e)
            if is_cpu_fp32(x_RD):
                halves = grad_M2F[:, :width], grad_M2F[:, width:]
                grad_gate_eFD, grad_up_eFD = (grouped_outer(half_MF, x_MD, offsets_e) for half_MF in halves)
            else:
                grad_gate_eFD, grad_up_eFD = grouped_outer(grad_M2F, x_MD, offsets_e).chunk(2, dim=1)
            return grad_gate_eFD, grad_up_eFD, grad_down_eDF

        ctx.later.gradients = weight_gradients
        # Of the right shapes; `_Hold.backward` returns what is computed instead.
        return grad_x_RD, grad_weights.view(ctx.choices_shape), None, None, gate_eFD, up_eFD, down_eDF
