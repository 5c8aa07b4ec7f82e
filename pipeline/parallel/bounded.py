"""Dispatch with buffers of fixed size: the host waits for nothing.

Every rank has room for `capacity` times the rows of even routing, and its experts for that many times their even share of pairs.
Within that bound the result is the same to the last bit as that of `AllToAllDispatch`: experts see the same rows in the same order.
Beyond it nothing is dropped: the output is NaN, and with it the loss on every rank, so that the step changes nothing, and it is
computed again with buffers that fit (pipeline/training/room.py), for which `Room.fixed` is false.

With a `Wire` the rows that are there travel, end to end, their number read on the device (device_flight.py), and the bound is on what a
rank gets from all ranks together, or sends to all: a pair of ranks may exceed its share. Without one no counts are exchanged, and the whole room
travels in equal parts, `capacity` times the bytes of `AllToAllDispatch`: the bound is on what comes from each rank; what is empty holds a copy of
some row and weighs nothing.

Legend: N tokens here, W ranks, P rows that one rank has room for from another, R = W * P, e experts of a rank.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.parallel.device_flight import DeviceJourney, Wire
from pipeline.parallel.dispatch import (
    ABSENT,
    AllToAllDispatch,
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


class Room:
    """How all layers of a network dispatch now: into buffers of `capacity` times even routing, or into such as fit."""

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.fixed = True


class BoundedDispatch:
    """Experts split over the ranks of `group`, contiguous and in rank order; all ranks bring as many slots."""

    def __init__(
        self, group: dist.ProcessGroup, room: Room, exposed: Exposed | None = None, wire: Wire | None = None
    ) -> None:
        """`wire`: by which the rows that are there travel, their number read on the device; None: all the room does."""
        self.group, self.wire = group, wire
        self.ranks = group.size()
        self.room = room
        self.exposed = exposed or Exposed()
        self.fitting = AllToAllDispatch(group, self.exposed)

    def plan(self, choices: Choices, counts_E: Tensor) -> Plan:
        if not self.room.fixed:
            return self.fitting.plan(choices, counts_E)
        experts_NK, W = choices.experts_RC, self.ranks
        (N, K), E = experts_NK.shape, counts_E.shape[0]
        if self.wire is not None:
            rows = room_for_all(N, E, K, W, self.room.capacity)
            placing = place(ranks_of(experts_NK, E // W, W), W, rows, all_chosen=False)
            counts_W2 = torch.stack([placing.counts, counts_E.view(W, -1).sum(1)], dim=1)
            return Plan(placing, weights_by_rank(choices, E, W), counts_W2)
        rows = room_for_rows(N, E, K, W, self.room.capacity)
        placing = place(ranks_of(experts_NK, E // W, W), W, W * rows, all_chosen=False, slots=rows)
        weights_LE = weights_by_rank(choices, E, W)
        slot_R = torch.arange(W * rows, device=counts_E.device)
        filled_R = slot_R % rows < placing.counts.index_select(0, slot_R // rows)
        weights_Re = weights_LE.index_select(0, placing.choice_M).where(filled_R.unsqueeze(1), ABSENT)
        too_many = (placing.counts > rows).any()  # what arrives is then no number, and so is what comes home
        weights_Re = weights_Re.where((weights_Re == ABSENT) | ~too_many, math.nan)
        return Plan(placing, weights_Re, counts_E.view(W, -1).sum(1, keepdim=True))

    def send(self, x_ND: Tensor, choices: Choices, plan: Plan | None) -> Journey:
        if not self.room.fixed:
            return self.fitting.send(x_ND, choices, plan)
        assert plan is not None
        N, K = choices.experts_RC.shape
        pairs = room_for_pairs(N, self.ranks * plan.weights_LE.shape[1], K, self.ranks, self.room.capacity)
        if self.wire is not None:
            return DeviceJourney(x_ND, plan, pairs, self.wire)
        return _Bounded(x_ND, plan, pairs, self.group, self.exposed)


class _Bounded:
    def __init__(self, x_ND: Tensor, plan: Plan, pairs: int, group: dist.ProcessGroup, exposed: Exposed) -> None:
        self.placing, self.pairs = plan.placing, pairs
        rows = [plan.weights_LE.shape[0] // group.size()] * group.size()
        self.there, self.back = Flight(rows, rows, group, exposed), Flight(rows, rows, group, exposed)
        self.under_way = launch(self.there, plan.weights_LE, copy_rows(x_ND, self.placing))

    def arrive(self) -> tuple[Tensor, Choices]:
        weights_Re, x_RD = land(self.there, *self.under_way)
        return x_RD, Choices(experts_of(weights_Re), weights_Re, self.pairs, all_chosen=False, bounded=True)

    def send_back(self, y_RD: Tensor) -> None:
        self.under_way = launch(self.back, y_RD)

    def come_home(self) -> Tensor:
        (y_RD,) = land(self.back, *self.under_way)
        return sum_rows(y_RD, self.placing)


def room_for_rows(tokens: int, experts: int, choices: int, ranks: int, capacity: float) -> int:
    """Rows that a rank has room for from each rank."""
    return min(tokens, math.ceil(capacity * tokens * ranks_met(experts, choices, ranks) / ranks))


def room_for_all(tokens: int, experts: int, choices: int, ranks: int, capacity: float) -> int:
    """Rows that a rank has room for from all ranks, and to all."""
    return min(ranks * tokens, math.ceil(capacity * tokens * ranks_met(experts, choices, ranks)))


def room_for_pairs(tokens: int, experts: int, choices: int, ranks: int, capacity: float) -> int:
    """Pairs of a row and an expert that a rank has room for."""
    return min(math.ceil(capacity * tokens * choices), ranks * tokens * min(choices, experts // ranks))
