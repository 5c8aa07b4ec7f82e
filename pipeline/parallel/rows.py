"""Rows copied to the bins that take them, and summed back: a counting sort in closed form and two adjoint gathers.

A row names up to C bins: the experts of a token, or the ranks that hold one of them. `place` sorts all (row, choice)
pairs by bin, rows in order inside a bin, without a sort: with a one for each (bin, row) that was named, laid out bin by
bin, the sum up to a cell is the place of its pair. `copy_rows` writes a row once for each of its bins; `sum_rows` adds up
what came out there. Each is the other's gradient and reads every row once; sums are in fp32, rounded once, in the order
of a row's choices, so no result depends on the order of atomics. On CUDA kernels of our own do the same
(pipeline/kernels/sorting.py); what stands here is their reference.

Legend: R rows, C choices of each, M pairs, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pipeline.kernels import sorting
from pipeline.kernels.choice import own_kernels


class Filled(NamedTuple):
    """Which places of a buffer of fixed size hold something: of each run of `slots` places the first `counts`, or all if they are more.

    What the others hold nobody reads: our kernels pass over them, and PyTorch's functions do with them as with any.
    """

    counts_B: Tensor  # int
    slots: int


class Placing(NamedTuple):
    """The pairs sorted by bin, and the way back."""

    row_M: Tensor  # int64: the row that each place holds
    choice_M: Tensor  # int64: which pair that is, r * C + c
    place_M: Tensor  # int64: the places of row 0 in the order of its choices, those of row 1, ...
    bags_R1: Tensor  # int64: where those of a row begin in `place_M`; the last number is the end
    counts: Tensor  # int64: rows of each bin, also those that were left out
    slots: int = 0  # places that each bin has of its own; 0: the bins lie end to end

    @property
    def filled(self) -> Filled | None:
        """None: places are there for what is in them."""
        return Filled(self.counts, self.slots) if self.slots else None

    def first(self, pairs: int) -> Placing:
        """Without the room that a bound left behind the last of the pairs."""
        return self._replace(row_M=self.row_M[:pairs], choice_M=self.choice_M[:pairs], place_M=self.place_M[:pairs])


def place(bins_RC: Tensor, bins: int, pairs: int, *, all_chosen: bool, slots: int | None = None) -> Placing:
    """Sort the pairs of `bins_RC`, int64 in [0, bins]; `bins` itself is no bin. No row names a bin twice.

    `pairs` is their number, or a bound where only the device knows it: places behind the last pair are zero, and pairs
    beyond the bound are left out, though counted. `slots`: each bin has that many places of its own, so `pairs` is
    bins * slots. `all_chosen`: every choice names a bin, and none is left out. The host waits for nothing.
    """
    if own_kernels(bins_RC):
        return Placing(*sorting.place(bins_RC, bins, pairs, slots or 0))._replace(slots=slots or 0)
    return place_plainly(bins_RC, bins, pairs, all_chosen=all_chosen, slots=slots)


def place_plainly(bins_RC: Tensor, bins: int, pairs: int, *, all_chosen: bool, slots: int | None = None) -> Placing:
    R, C = bins_RC.shape
    device, bins_CR = bins_RC.device, bins_RC.T
    named = torch.zeros(bins + 1, R, dtype=torch.int32, device=device).scatter_(0, bins_CR, 1)
    upto = named.view(-1).cumsum(0, dtype=torch.int32).view(bins + 1, R)
    place_RC = (upto.gather(0, bins_CR) - 1).T.long()
    counts = named[:bins].sum(1)
    choices = torch.arange(R * C, device=device)
    if all_chosen:
        place_M = place_RC.reshape(-1)
        bags_R1 = torch.arange(R + 1, device=device) * C
        choice_M = torch.empty_like(choices).scatter_(0, place_M, choices)
        return Placing(choice_M // C, choice_M, place_M, bags_R1, counts)
    chosen_RC = bins_RC < bins
    if slots is None:
        chosen_RC = chosen_RC & (place_RC < pairs)
    else:
        first_RC = (counts.cumsum(0) - counts).index_select(0, bins_RC.clamp(max=bins - 1).reshape(-1)).view(R, C)
        chosen_RC = chosen_RC & (place_RC - first_RC < slots)
        place_RC = place_RC - first_RC + bins_RC * slots
    pair_RC = (chosen_RC.view(-1).cumsum(0) - 1).view(R, C)

    def scattered(index_RC: Tensor, values: Tensor) -> Tensor:
        """values at index, of the choices that are one; the others land behind the end."""
        index = index_RC.where(chosen_RC, pairs).reshape(-1)
        return torch.zeros(pairs + 1, dtype=torch.int64, device=device).scatter_(0, index, values)[:pairs]

    choice_M = scattered(place_RC, choices)
    place_M = scattered(pair_RC, place_RC.reshape(-1))
    end_R = chosen_RC.sum(1).cumsum(0)
    bags_R1 = torch.cat([end_R.new_zeros(1), end_R])
    return Placing(choice_M // max(C, 1), choice_M, place_M, bags_R1, counts, slots or 0)


def copy_rows(x_RD: Tensor, placing: Placing) -> Tensor:
    """rows_MD[m] = x_RD[row of m], in the places that are filled."""
    return cast(Tensor, _Copy.apply(x_RD, placing.row_M, placing.place_M, placing.bags_R1, placing.filled))


def sum_rows(rows_MD: Tensor, placing: Placing) -> Tensor:
    """y_RD[r] = sum of rows_MD over the places of r."""
    return cast(Tensor, _Sum.apply(rows_MD, placing.row_M, placing.place_M, placing.bags_R1, placing.filled))


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, row_M: Tensor, place_M: Tensor, bags_R1: Tensor, filled: Filled | None
    ) -> Tensor:
        ctx.save_for_backward(place_M, bags_R1)
        return gathered(x_RD, row_M, filled)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None, None, None]:
        return bag_sums(grad_MD, *ctx.saved_tensors), None, None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_MD: Tensor, row_M: Tensor, place_M: Tensor, bags_R1: Tensor, filled: Filled | None
    ) -> Tensor:
        ctx.save_for_backward(row_M, *(filled or ())[:1])
        ctx.slots = filled.slots if filled else 0
        return bag_sums(rows_MD, place_M, bags_R1)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None, None]:
        row_M, *counts = ctx.saved_tensors
        filled = Filled(counts[0], ctx.slots) if counts else None
        return gathered(grad_RD.contiguous(), row_M, filled), None, None, None, None


def gathered(x_RD: Tensor, row_M: Tensor, filled: Filled | None = None) -> Tensor:
    """`copy_rows` without autograd."""
    if own_kernels(x_RD):
        return sorting.copy_rows(x_RD, row_M, *(filled or (None, 0)))
    return x_RD.index_select(0, row_M)


def gather_into(into_MD: Tensor, x_RD: Tensor, row_M: Tensor, filled: Filled) -> None:
    """`gathered` to where the caller has room."""
    if own_kernels(x_RD):
        sorting.copy_rows_into(into_MD, x_RD, row_M, *filled)
    elif x_RD.shape[0]:
        torch.index_select(x_RD, 0, row_M, out=into_MD)


def bag_sums(rows_MD: Tensor, place_M: Tensor, bags_R1: Tensor, into_RD: Tensor | None = None) -> Tensor:
    """`sum_rows` without autograd: y_RD[r] = sum over j in [bags[r], bags[r + 1]) of rows_MD[place_M[j]]; `into_RD` where the caller has room."""
    own = own_kernels(rows_MD)
    if into_RD is None:
        return (sorting.bag_sums if own else sum_plainly)(rows_MD, place_M, bags_R1)
    if own:
        sorting.bag_sums_into(into_RD, rows_MD, place_M, bags_R1)
        return into_RD
    return into_RD.copy_(sum_plainly(rows_MD, place_M, bags_R1))


def sum_plainly(rows_MD: Tensor, place_M: Tensor, bags_R1: Tensor) -> Tensor:
    """By PyTorch's embedding bag, one pass."""
    if rows_MD.shape[0] == 0:
        return rows_MD.new_zeros(bags_R1.shape[0] - 1, rows_MD.shape[1])
    return torch.embedding_bag(rows_MD, place_M, bags_R1, False, 0, False, None, True)[0]
