"""Bringing rows to the ranks that hold their experts, and back.

`LocalDispatch`: every expert is here; nothing moves.

`AllToAllDispatch`: the E experts are split evenly over the ranks of a group, rank r holding experts [r*e, (r+1)*e).
One `all_to_all_single` carries the counts (E integers), one the rows, and one brings the results back; backward takes
the same two exchanges of rows in the other direction. Bytes sent a rank and direction: the rows whose experts live
elsewhere, D * itemsize each. A rank without rows still enters every exchange: the others wait for it.

Arriving rows are ordered by (source rank, local expert); the experts want (local expert, source rank), a permutation
of blocks known from the counts. The exchange needs the block sizes on the host, one device synchronisation a layer.

Legend: M rows (before: of this rank's tokens; after: of this rank's experts), D hidden, E experts, e = E / ranks, W ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class LocalDispatch:
    """All experts on this rank."""

    def dispatch(self, x_MD: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, None]:
        return x_MD, counts_E, None

    def combine(self, x_MD: Tensor, handle: None) -> Tensor:
        return x_MD


class ExchangePlan(NamedTuple):
    """What `combine` needs to send the rows home."""

    sent_W: list[int]  # rows to each rank
    received_W: list[int]  # rows from each rank
    by_source_M: Tensor  # where each row that arrived stands among the rows grouped by expert


class AllToAllDispatch:
    """Experts split over the ranks of `group`, contiguous and in rank order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ranks = group.size()

    def dispatch(self, x_MD: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, ExchangePlan]:
        W = self.ranks
        arriving_E = torch.empty_like(counts_E)
        dist.all_to_all_single(arriving_E, counts_E, group=self.group)
        arriving_We = arriving_E.view(W, -1)
        sent_W, received_W = torch.stack([counts_E.view(W, -1).sum(1), arriving_We.sum(1)]).tolist()
        by_expert_M = _by_expert(arriving_We, sum(received_W))
        by_source_M = inverse_permutation(by_expert_M)
        arrived_MD = ExchangeRows.apply(x_MD, sent_W, received_W, self.group)
        rows_MD = Permute.apply(arrived_MD, by_expert_M, by_source_M)
        return rows_MD, arriving_We.sum(0), ExchangePlan(sent_W, received_W, by_source_M)

    def combine(self, x_MD: Tensor, handle: ExchangePlan) -> Tensor:
        by_source_MD = Permute.apply(x_MD, handle.by_source_M, inverse_permutation(handle.by_source_M))
        return ExchangeRows.apply(by_source_MD, handle.received_W, handle.sent_W, self.group)


def inverse_permutation(index_M: Tensor) -> Tensor:
    """`inverse[index[m]] = m`; no sort, and no wait for the device."""
    positions_M = torch.arange(index_M.numel(), device=index_M.device)
    return torch.empty_like(index_M).scatter_(0, index_M, positions_M)


def _by_expert(arriving_We: Tensor, rows: int) -> Tensor:
    """Indices that turn (source, expert) order into (expert, source) order: a stable sort of each row's expert."""
    W, e = arriving_We.shape
    experts_We = torch.arange(e, device=arriving_We.device).expand(W, e).flatten()
    expert_M = experts_We.repeat_interleave(arriving_We.flatten(), output_size=rows)
    return expert_M.argsort(stable=True)


class ExchangeRows(torch.autograd.Function):
    """all_to_all_single of rows; the gradient takes the opposite way."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, sent_W: list[int], received_W: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent_W, ctx.received_W, ctx.group = sent_W, received_W, group
        return _exchange(x_MD, sent_W, received_W, group)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad_MD, ctx.received_W, ctx.sent_W, ctx.group), None, None, None


class Permute(torch.autograd.Function):
    """x[index] for a permutation whose inverse is at hand: the gradient is a gather, too."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, index_M: Tensor, inverse_M: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_M)
        return x_MD.index_select(0, index_M)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_M,) = ctx.saved_tensors
        return grad_MD.index_select(0, inverse_M), None, None


def _exchange(x_MD: Tensor, sent_W: list[int], received_W: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived_MD = x_MD.new_empty(sum(received_W), *x_MD.shape[1:])
    dist.all_to_all_single(arrived_MD, x_MD.contiguous(), received_W, sent_W, group=group)
    return arrived_MD
