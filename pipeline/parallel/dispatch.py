"""Bringing tokens to the ranks that hold their experts, and the results back.

`LocalDispatch`: every expert is here; nothing moves.

`AllToAllDispatch`: the E experts are split evenly over the W ranks of a group, rank r holding experts [r*e, (r+1)*e).
A token travels once to each rank that holds one of its experts, with its weights for the e experts there (fp32, `ABSENT`
for those that it did not choose); it is copied to its experts there, and the weighted sum of their results comes back as
one row, to be added to those of the other ranks. Of K choices a token meets

    W * (1 - C(E - e, K) / C(E, K))

ranks if routing is even: 4.5 of 6 at E 64, W 8. Each way takes one `all_to_all_single` of rows, forward and backward,
launched before and awaited after what needs no rows (flight.py). Bytes a rank sends: the rows that leave it, D * itemsize
each, and the weights of those that go to experts, 4 e. A rank without rows still enters every exchange.

An exchange of counts (2 W integers) comes first. The host reads it, one wait a layer: buffers have the size of what is
in them. `BoundedDispatch` (bounded.py) waits for nothing.

Legend: N tokens here, K choices of each, S rows sent, R rows that arrived, D hidden, E experts, e = E / W, W ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.kernels import sorting
from pipeline.kernels.choice import own_kernels
from pipeline.parallel.exposed import Exposed
from pipeline.parallel.flight import Flight, land, launch
from pipeline.parallel.rows import Placing, copy_rows, place, sum_rows

ABSENT = -1.0  # no weight is negative


class Ends(NamedTuple):
    """Of a way to experts and back in memory of its own: experts read and write there."""

    arrived_RD: Tensor  # the rows, until experts have read them; what backward needs of them is elsewhere
    room: Callable[
        [], Tensor
    ]  # [R, D]: for what goes back next, forward or backward; nothing else may be sent before it


class Choices(NamedTuple):
    """Rows and the experts that each one is for."""

    experts_RC: Tensor  # int64, numbered from 0 on this rank; their number where a choice is none
    weights_RC: Tensor  # fp32
    pairs: int  # of a row and an expert
    all_chosen: bool  # no choice is none
    bounded: bool = False  # `pairs` is a bound: more of them make the result NaN
    ends: Ends | None = None


class Plan(NamedTuple):
    """Of this rank's tokens: what goes where."""

    placing: Placing  # of tokens over ranks, with room for all there could be
    weights_LE: Tensor  # [N * W, e]
    counts_W2: Tensor  # to each rank: rows, and pairs with experts there


class Journey(Protocol):
    """Tokens on their way."""

    def arrive(self) -> tuple[Tensor, Choices]:
        """The rows that this rank's experts are to work on."""

    def send_back(self, y_RD: Tensor) -> None:
        """Launch the way home of the results."""

    def come_home(self) -> Tensor:
        """y_ND: the sums over the ranks that a token met; zero for a token without experts."""


class Dispatcher(Protocol):
    def plan(self, choices: Choices, counts_E: Tensor) -> Plan | None:
        """What can be known before anything moves; on the device alone."""

    def send(self, x_ND: Tensor, choices: Choices, plan: Plan | None) -> Journey:
        """Launch the rows."""


class LocalDispatch:
    """All experts on this rank."""

    def plan(self, choices: Choices, counts_E: Tensor) -> None:
        return None

    def send(self, x_ND: Tensor, choices: Choices, plan: Plan | None) -> Journey:
        return _Stay(x_ND, choices)


class _Stay:
    def __init__(self, x_ND: Tensor, choices: Choices) -> None:
        self.x_ND, self.choices = x_ND, choices

    def arrive(self) -> tuple[Tensor, Choices]:
        return self.x_ND, self.choices

    def send_back(self, y_RD: Tensor) -> None:
        self.x_ND = y_RD

    def come_home(self) -> Tensor:
        return self.x_ND


class AllToAllDispatch:
    """Experts split over the ranks of `group`, contiguous and in rank order."""

    def __init__(self, group: dist.ProcessGroup, exposed: Exposed | None = None) -> None:
        self.group = group
        self.ranks = group.size()
        self.exposed = exposed or Exposed()

    def plan(self, choices: Choices, counts_E: Tensor) -> Plan:
        experts_NK, W = choices.experts_RC, self.ranks
        (N, K), E = experts_NK.shape, counts_E.shape[0]
        e = E // W
        placing = place(ranks_of(experts_NK, e, W), W, N * min(K, W), all_chosen=False)
        counts_W2 = torch.stack([placing.counts, counts_E.view(W, e).sum(1)], dim=1)
        return Plan(placing, weights_by_rank(choices, E, W), counts_W2)

    def send(self, x_ND: Tensor, choices: Choices, plan: Plan | None) -> Journey:
        assert plan is not None
        return _AllToAll(x_ND, plan, self.group, self.exposed)


class _AllToAll:
    def __init__(self, x_ND: Tensor, plan: Plan, group: dist.ProcessGroup, exposed: Exposed) -> None:
        arriving_W2 = torch.empty_like(plan.counts_W2)
        with exposed:
            dist.all_to_all_single(arriving_W2, plan.counts_W2, group=group)
        (sent_W, _), (received_W, pairs_W) = torch.stack([plan.counts_W2.T, arriving_W2.T]).tolist()
        self.group, self.pairs = group, sum(pairs_W)
        self.placing = plan.placing.first(sum(sent_W))
        self.there = Flight(sent_W, received_W, group, exposed)
        self.back = Flight(received_W, sent_W, group, exposed)
        x_SD = copy_rows(x_ND, self.placing)
        weights_Se = plan.weights_LE.index_select(0, self.placing.choice_M)
        self.under_way = launch(self.there, weights_Se, x_SD)

    def arrive(self) -> tuple[Tensor, Choices]:
        weights_Re, x_RD = land(self.there, *self.under_way)
        return x_RD, Choices(experts_of(weights_Re), weights_Re, self.pairs, False)

    def send_back(self, y_RD: Tensor) -> None:
        self.under_way = launch(self.back, y_RD)

    def come_home(self) -> Tensor:
        (y_SD,) = land(self.back, *self.under_way)
        return sum_rows(y_SD, self.placing)


def ranks_of(experts_NK: Tensor, experts_per_rank: int, ranks: int) -> Tensor:
    """[N, W]: each rank that holds an expert of the token, `ranks` in place of the others."""
    if own_kernels(experts_NK):
        return sorting.ranks_of(experts_NK, experts_per_rank, ranks)
    return ranks_plainly(experts_NK, experts_per_rank, ranks)


def ranks_plainly(experts_NK: Tensor, experts_per_rank: int, ranks: int) -> Tensor:
    N, W, device = experts_NK.shape[0], ranks, experts_NK.device
    met_NW = torch.zeros(N, W + 1, dtype=torch.bool, device=device).scatter_(1, experts_NK // experts_per_rank, True)
    return torch.arange(W, device=device).expand(N, W).where(met_NW[:, :W], W)


def weights_by_rank(choices: Choices, experts: int, ranks: int) -> Tensor:
    """[N * W, e]: what each token's choices weigh, `ABSENT` where it did not choose."""
    weights_NK, N = choices.weights_RC, choices.weights_RC.shape[0]
    absent_NE = weights_NK.new_full((N, experts + 1), ABSENT)
    return absent_NE.scatter(1, choices.experts_RC, weights_NK)[:, :experts].reshape(N * ranks, experts // ranks)


def experts_of(weights_Re: Tensor) -> Tensor:
    """The experts that weigh something, e in place of the others."""
    R, e = weights_Re.shape
    return torch.arange(e, device=weights_Re.device).expand(R, e).where(weights_Re.detach() != ABSENT, e)


def ranks_met(experts: int, choices: int, ranks: int) -> float:
    """Ranks that hold one of a token's experts, on average, if routing is even."""
    none = math.comb(experts - experts // ranks, choices) / math.comb(experts, choices)
    return ranks * (1 - none)
