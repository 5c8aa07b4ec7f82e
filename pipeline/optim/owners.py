"""Who does which work: tasks to ranks, balanced by arithmetic and by bytes.

A task is a matrix to be orthogonalised. It costs floating-point operations wherever it is done, and its elements travel
to the rank that does it (its owner) and back. Both are to be level: the slowest rank and the busiest link end a step.

What a rank sends. Let every rank store S = P / W of the P elements that are exchanged, in equal pieces, and let rank r
own O_r of them. It sends the S - O_r / W that others own to their owners, and O_r - O_r / W results back: in elements,

    S + O_r (1 - 2 / W),   on average 2 (P / W) (W - 1) / W.

So the average is fixed, and a rank stays at it exactly if it owns its share P / W. Whole matrices cannot always be
shared out like that: who owns a matrix of n > P / W elements sends at least S + n (1 - 2 / W), as n (1 - 1 / W) results
exist on no other rank and its own pieces of everybody else's matrices have to leave it. No choice of owners gets below
that. Cutting the matrix would, but the first product of every Newton-Schulz step sums over the whole long side, and in
parts it rounds differently (and costs short^2 elements of traffic a step). Two owners that both orthogonalise it, each
for half of the holders, would receive its n elements twice. Here the update stays that of the whole matrix, sent once.

Two criteria, one order: cost is a limit (a rank may exceed the average by `COST_SLACK`), bytes are minimised within it.
First greedily, largest matrix first, each to the candidate that owns the fewest elements. Work that only some ranks can
do (experts of an EP group, work that replicas share) counts in equal parts there until it is placed, so that what can
go anywhere leaves room for it. Then moves and swaps: away from the rank with most work while it exceeds the limit, then
from those that own most elements while the limit allows it. Where a task fits nowhere below the limit it goes to where
it exceeds it least. A matrix is never cut: no rank can have less to do than the costliest one.

Cost: O(tasks * candidates) numpy operations on vectors of ranks, about a second at 1,024 ranks; integers and one order of
additions, hence the same result on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

COST_SLACK = 0.02
PASSES = 2  # over the ranks that own more than the average
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Task:
    """One matrix and the ranks that could orthogonalise it."""

    cost: int  # floating-point operations
    elements: int  # that travel to the owner; 0: none do
    ranks: tuple[int, ...]


def assign(tasks: Sequence[Task], world: int, busy: Sequence[int] = ()) -> list[int]:
    """For each task the index, into its `ranks`, of the one that does it. `busy`: the cost that each rank has already."""
    balance = _Balance(tasks, world, busy)
    balance.place_all()
    balance.improve()
    return [task.ranks.index(owner) for task, owner in zip(tasks, balance.owner, strict=True)]


class _Balance:
    """Tasks that are alike in cost, elements and candidates are one *kind*; kinds are few, so search is over them."""

    def __init__(self, tasks: Sequence[Task], world: int, busy: Sequence[int]) -> None:
        self.tasks, self.world = tasks, world
        self.owner = [task.ranks[0] for task in tasks]
        numbers: dict[Task, int] = {}
        self.kind = [numbers.setdefault(task, len(numbers)) for task in tasks]
        self.kinds = list(numbers)
        self.ranks = [np.array(kind.ranks) for kind in self.kinds]
        self.may = np.zeros((len(self.kinds), world), bool)
        for kind, ranks in enumerate(self.ranks):
            self.may[kind, ranks] = True
        self.held = [[list[int]() for _ in range(world)] for _ in self.kinds]  # tasks by kind and rank
        self.count = np.zeros((len(self.kinds), world), np.int64)
        self.load, self.elements = np.zeros(world, np.int64), np.zeros(world, np.int64)
        self.load[: len(busy)] = busy
        self.limit = (1 + COST_SLACK) * (sum(task.cost for task in tasks) + sum(busy)) / world

    def place(self, index: int, rank: int) -> None:
        task, kind = self.tasks[index], self.kind[index]
        self.owner[index] = rank
        self.load[rank] += task.cost
        self.elements[rank] += task.elements
        self.held[kind][rank].append(index)
        self.count[kind, rank] += 1

    def take(self, kind: int, rank: int) -> int:
        """Removes a task of this kind from the rank and returns it."""
        self.load[rank] -= self.kinds[kind].cost
        self.elements[rank] -= self.kinds[kind].elements
        self.count[kind, rank] -= 1
        return self.held[kind][rank].pop()

    def place_all(self) -> None:
        """Without a choice first, then by falling size."""
        pool, sizes = np.arange(self.world), np.ones(self.world)  # of each rank: its pool; of each pool: its ranks
        waiting = np.zeros(self.world)  # cost of a pool's tasks that are not placed yet
        pooled = [1 < len(k.ranks) < self.world or (len(k.ranks) > 1 and not k.elements) for k in self.kinds]
        for kind, ranks in enumerate(self.ranks):
            if pooled[kind]:
                pool[ranks] = ranks[0]
        sizes = np.bincount(pool, minlength=self.world).astype(float)
        for kind in self.kind:
            if pooled[kind]:
                waiting[pool[self.ranks[kind][0]]] += self.kinds[kind].cost
        placed = np.bincount(pool, self.load, self.world)
        order = sorted(
            range(len(self.tasks)),
            key=lambda i: (len(self.tasks[i].ranks) > 1, -self.tasks[i].elements, -self.tasks[i].cost),
        )
        for index in order:
            task, kind = self.tasks[index], self.kind[index]
            ranks = self.ranks[kind]
            if pooled[kind]:
                waiting[pool[ranks[0]]] -= task.cost
            elif len(ranks) > 1:
                there = pool[ranks]
                ranks = _least(ranks, placed[there] + waiting[there] + task.cost - sizes[there] * self.limit)
            if len(ranks) > 1:
                ranks = _least(ranks, self.load[ranks] + task.cost - self.limit)
                ranks = _least(ranks, self.elements[ranks] * (task.elements > 0))
                ranks = ranks[self.load[ranks] == self.load[ranks].min()]
            self.place(index, int(ranks[0]))
            placed[pool[ranks[0]]] += task.cost

    def improve(self) -> None:
        """Less for the rank with most work while it exceeds the limit; then fewer elements for those with most."""
        costs = np.array([kind.cost for kind in self.kinds], np.int64)
        sizes = np.array([kind.elements for kind in self.kinds], np.int64)
        open_ = self.load > self.limit
        while open_.any():
            most = int(np.where(open_, self.load, -1).argmax())
            open_[most] = self._relieve(most, costs, self.load) and self.load[most] > self.limit
        average = self.elements.sum() / self.world
        for _ in range(PASSES):
            open_ = self.elements > average
            while open_.any():
                most = int(np.where(open_, self.elements, -1).argmax())
                open_[most] = self._relieve(most, sizes, self.elements, costs) and self.elements[most] > average
        while self._relieve(int(self.elements.argmax()), sizes, self.elements, costs):
            pass

    def _relieve(self, most: int, sizes: Array, total: Array, costs: Array | None = None) -> bool:
        """Gives a task of `most` away, or swaps it, so that the larger `total` of both ranks falls furthest; whether it could."""
        best: tuple[int, int, int, int] | None = None  # (that total, kind given, rank, kind taken or -1)
        for given in np.flatnonzero(self.count[:, most]).tolist():
            ranks = self.ranks[given]
            for taken in (-1, *np.flatnonzero(self.may[:, most]).tolist()):
                moved = sizes[given] - (sizes[taken] if taken >= 0 else 0)
                if moved <= 0:
                    continue
                after = np.maximum(total[most] - moved, total[ranks] + moved)
                good = after < (total[most] if best is None else best[0])
                if taken >= 0:
                    good &= self.count[taken, ranks] > 0
                if costs is not None:
                    work = costs[given] - (costs[taken] if taken >= 0 else 0)
                    good &= self.load[ranks] + work <= np.maximum(self.limit, self.load[ranks])
                    good &= self.load[most] - work <= max(self.limit, self.load[most])
                if good.any():
                    at = int(np.where(good, after, total[most]).argmin())
                    best = int(after[at]), given, int(ranks[at]), taken
        if best is None:
            return False
        _, given, rank, taken = best
        gift = self.take(given, most)
        if taken >= 0:
            self.place(self.take(taken, rank), most)
        self.place(gift, rank)
        return True


def _least(ranks: Array, values: Array) -> Array:
    """Those with the smallest value, where anything below zero is as good as zero."""
    values = np.maximum(values, 0)
    return ranks[values == values.min()]
