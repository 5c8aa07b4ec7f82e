"""Dispatch with buffers of fixed size: no counts are exchanged and the host waits for nothing.

Every rank has room for `capacity` times the rows that even routing would send it from each other rank, and its experts
for that many times their even share of pairs. Exchanges carry the whole room, in equal parts, so they move `capacity`
times the bytes of `AllToAllDispatch`; what is empty holds a copy of some row and weighs nothing. Within the bound the
result is the same. Beyond it nothing is dropped: the output is NaN, and with it the loss, and the guard skips the step
and counts it (pipeline/training/guard.py).

Legend: N tokens here, W ranks, P rows that one rank has room for from another, R = W * P, e experts of a rank.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.parallel.dispatch import (
    ABSENT,
    Choices,
    Journey,
    Plan,
    experts_of,
    ranks_met,
    ranks_of,
    weights_by_rank,
)
from pipeline.parallel.exposed import Exposed
from pipeline.parallel.flight import Flight, land, launch
from pipeline.parallel.rows import copy_rows, place, sum_rows


class BoundedDispatch:
    """Experts split over the ranks of `group`, contiguous and in rank order; all ranks bring as many slots."""

    def __init__(self, group: dist.ProcessGroup, capacity: float, exposed: Exposed | None = None) -> None:
        self.group = group
        self.ranks = group.size()
        self.capacity = capacity
        self.exposed = exposed or Exposed()

    def plan(self, choices: Choices, counts_E: Tensor) -> Plan:
        experts_NK, W = choices.experts_RC, self.ranks
        (N, K), E = experts_NK.shape, counts_E.shape[0]
        rows = room(N, E, K, W, self.capacity)
        placing = place(ranks_of(experts_NK, E // W, W), W, W * rows, all_chosen=False, slots=rows)
        weights_LE = weights_by_rank(choices, E, W)
        slot_R = torch.arange(W * rows, device=counts_E.device)
        filled_R = slot_R % rows < placing.counts.index_select(0, slot_R // rows)
        weights_Re = weights_LE.index_select(0, placing.choice_M).where(filled_R.unsqueeze(1), ABSENT)
        return Plan(placing, weights_Re, counts_E.view(W, -1).sum(1, keepdim=True))

    def send(self, x_ND: Tensor, choices: Choices, plan: Plan | None) -> Journey:
        assert plan is not None
        N, K = choices.experts_RC.shape
        pairs = min(math.ceil(self.capacity * N * K), self.ranks * N * min(K, plan.weights_LE.shape[1]))
        return _Bounded(x_ND, plan, pairs, self.group, self.exposed)


class _Bounded:
    def __init__(self, x_ND: Tensor, plan: Plan, pairs: int, group: dist.ProcessGroup, exposed: Exposed) -> None:
        self.placing, self.pairs = plan.placing, pairs
        rows = [plan.weights_LE.shape[0] // group.size()] * group.size()
        self.too_many = (plan.placing.counts > rows[0]).any()
        self.there, self.back = Flight(rows, rows, group, exposed), Flight(rows, rows, group, exposed)
        self.under_way = launch(self.there, plan.weights_LE, copy_rows(x_ND, self.placing))

    def arrive(self) -> tuple[Tensor, Choices]:
        weights_Re, x_RD = land(self.there, *self.under_way)
        return x_RD, Choices(experts_of(weights_Re), weights_Re, self.pairs, all_chosen=False, bounded=True)

    def send_back(self, y_RD: Tensor) -> None:
        self.under_way = launch(self.back, y_RD)

    def come_home(self) -> Tensor:
        (y_RD,) = land(self.back, *self.under_way)
        return sum_rows(y_RD, self.placing).masked_fill(self.too_many, math.nan)


def room(tokens: int, experts: int, choices: int, ranks: int, capacity: float) -> int:
    """Rows that a rank has room for from each rank."""
    return min(tokens, math.ceil(capacity * tokens * ranks_met(experts, choices, ranks) / ranks))
