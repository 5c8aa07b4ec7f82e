"""The products of routed experts with gradients by hand: rows to their experts, three products, weighted sums back.

Forward copies each row to its experts' places, multiplies, and sums up what comes out of them. Kept for backward are the rows, gate
and up, and where rows lie: copies of rows and hidden numbers are made again, a gather and a by-product of the activation's gradients.

Backward gives the rows their gradients first, for those travel on, and leaves those of the weights for later: `hold` is a node
that the weights pass through before the rows arrive; its own backward runs once the rows' gradients are on their way
(pipeline/parallel/flight.py says why then) and computes them behind that exchange.

With `fp8` the products that rows take part in multiply numbers of eight bits (pipeline/model/row_products.py); what is kept for backward, and
the gradients of the weights, are the same as without, of the same rows in the compute dtype.

Legend: R rows, C choices of each, M pairs, D hidden, F width, e experts here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pipeline.kernels.activation import swiglu, swiglu_backward
from pipeline.model.grouped import grouped_outer
from pipeline.model.matmul import is_cpu_fp32
from pipeline.model.row_products import Fp8, Fp8Copies, Places, Stacks, Wide
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


def expert_products(x_RD: Tensor, choices: Choices, held: Held, fp8: Fp8Copies | None = None) -> Tensor:
    """y_RD: the weighted sum of what each row's experts make of it. `fp8`: the copies of the stacks to multiply."""
    return cast(Tensor, _Products.apply(x_RD, choices.weights_RC, choices, fp8, *held))


def _pairs(choices: Choices, experts: int) -> int:
    """How many places there are. A CPU knows at once how many pairs a bound is for: PyTorch computes an exponent at the end of an array,
    behind its last whole vector, to other bits than inside, so the array's length has to be that of what is in it."""
    if not choices.bounded or choices.experts_RC.device.type != "cpu":
        return choices.pairs
    return min(choices.pairs, int((choices.experts_RC < experts).sum()))


def _with(fp8: Fp8Copies | None, stacks: Stacks, places: Places) -> Wide | Fp8:
    return Wide(stacks, places) if fp8 is None else Fp8(stacks, places, fp8)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, weights_RC: Tensor, choices: Choices, fp8: Fp8Copies | None, later: Later,
        gate_eFD: Tensor, up_eFD: Tensor, down_eDF: Tensor,
    ) -> Tensor:  # fmt: skip
        pairs, ends = _pairs(choices, gate_eFD.shape[0]), choices.ends
        placing = place(choices.experts_RC, gate_eFD.shape[0], pairs, all_chosen=choices.all_chosen)
        offsets_e = placing.counts.cumsum(0).clamp(max=pairs).int()
        weights_M = weights_RC.flatten().index_select(0, placing.choice_M)
        if choices.bounded:
            weights_M.masked_fill_(placing.counts.sum() > choices.pairs, torch.nan)
        end = offsets_e[-1:] if choices.bounded else None
        filled = None if end is None else Filled(end, pairs)
        products = _with(fp8, Stacks(gate_eFD, up_eFD, down_eDF), Places(placing.row_M, offsets_e, filled))
        gate_MF, up_MF = products.gate_up(x_RD if ends is None else ends.arrived_RD)
        y_MD = products.down(swiglu(gate_MF, up_MF, weights_M, end))
        y_RD = bag_sums(y_MD, placing.place_M, placing.bags_R1, None if ends is None else ends.room())
        ctx.fp8, ctx.later, ctx.bounded = fp8, later, choices.bounded
        ctx.room = None if ends is None else ends.room
        ctx.save_for_backward(
            x_RD, gate_MF, up_MF, weights_M, offsets_e,
            placing.row_M, placing.choice_M, placing.place_M, placing.bags_R1, gate_eFD, up_eFD, down_eDF,
        )  # fmt: skip
        ctx.choices_shape = weights_RC.shape
        return y_RD

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, Tensor, None, None, None, Tensor, Tensor, Tensor]:
        (
            x_RD, gate_MF, up_MF, weights_M, offsets_e, row_M, choice_M, place_M, bags_R1, gate_eFD, up_eFD, down_eDF,
        ) = ctx.saved_tensors  # fmt: skip
        pairs, width = gate_MF.shape
        end = offsets_e[-1:] if ctx.bounded else None
        filled = None if end is None else Filled(end, pairs)
        grad_MD = gathered(grad_RD.contiguous(), row_M, filled)
        products = _with(ctx.fp8, Stacks(gate_eFD, up_eFD, down_eDF), Places(row_M, offsets_e, filled))
        grad_hidden_MF = products.through_down(grad_MD)
        grad_M2F, hidden_MF, grad_weights_M = swiglu_backward(grad_hidden_MF, gate_MF, up_MF, weights_M, end)
        grad_x_MD = products.through_gate_up(grad_M2F)
        grad_x_RD = bag_sums(grad_x_MD, place_M, bags_R1, None if ctx.room is None else ctx.room())
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
        return grad_x_RD, grad_weights.view(ctx.choices_shape), None, None, None, gate_eFD, up_eFD, down_eDF
