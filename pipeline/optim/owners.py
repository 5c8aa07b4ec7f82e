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
First greedily, largest matrix first, each to the candidate that owns the fewest elements; then by moves and swaps that
take from the rank that owns most, until none helps. Where a task fits nowhere below the limit it goes to where it
exceeds it least.

Cost: O(tasks * candidates) and a few hundred rounds over the ranks; pure Python, the same result on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

COST_SLACK = 0.02


@dataclass(frozen=True)
class Task:
    """One matrix and the ranks that could orthogonalise it."""

    cost: int  # floating-point operations
    elements: int  # that travel to the owner; 0: none do
    ranks: tuple[int, ...]


def assign(tasks: Sequence[Task], world: int) -> list[int]:
    """For each task the index, into its `ranks`, of the one that does it."""
    balance = _Balance(tasks, world)
    balance.place_all()
    balance.improve()
    return [task.ranks.index(owner) for task, owner in zip(tasks, balance.owner, strict=True)]


class _Balance:
    def __init__(self, tasks: Sequence[Task], world: int) -> None:
        self.tasks = tasks
        self.owner = [task.ranks[0] for task in tasks]
        self.load, self.elements = [0.0] * world, [0] * world
        self.held: list[list[int]] = [[] for _ in range(world)]  # tasks of a rank
        # Ranks among which work can still be moved when all else is placed are one for the limit.
        self.pool: list[tuple[int, ...]] = [(rank,) for rank in range(world)]
        self.limit = (1 + COST_SLACK) * sum(task.cost for task in tasks) / world

    def place(self, index: int, rank: int) -> None:
        task = self.tasks[index]
        self.owner[index] = rank
        self.load[rank] += task.cost
        self.elements[rank] += task.elements
        self.held[rank].append(index)

    def remove(self, index: int) -> None:
        task, rank = self.tasks[index], self.owner[index]
        self.load[rank] -= task.cost
        self.elements[rank] -= task.elements
        self.held[rank].remove(index)

    def place_all(self) -> None:
        """Without a choice first, then by falling size. Work that stays where it is, but can be shared by replicas,
        comes last and until then counts in equal parts."""
        order = sorted(
            range(len(self.tasks)),
            key=lambda i: (len(self.tasks[i].ranks) > 1, -self.tasks[i].elements, -self.tasks[i].cost),
        )
        shared = [task for task in self.tasks if not task.elements and len(task.ranks) > 1]
        for task in shared:
            self._spread(task, 1)
            for rank in task.ranks:
                self.pool[rank] = task.ranks
        for index in order:
            task = self.tasks[index]
            if not task.elements and len(task.ranks) > 1:
                self._spread(task, -1)
            self.place(index, min(task.ranks, key=lambda rank: self._preference(task, rank)))

    def _spread(self, task: Task, sign: int) -> None:
        for rank in task.ranks:
            self.load[rank] += sign * task.cost / len(task.ranks)

    def _preference(self, task: Task, rank: int) -> tuple[float, int, float]:
        pool = self.pool[rank]
        excess = max(0.0, sum(self.load[member] for member in pool) + task.cost - len(pool) * self.limit)
        return excess, self.elements[rank] if task.elements else 0, self.load[rank]

    def improve(self) -> None:
        """Relieves the rank that owns most, as long as that is possible; then the next."""
        limit = max(self.limit, *self.load)
        final: set[int] = set()
        while len(final) < len(self.load):
            most = max((r for r in range(len(self.load)) if r not in final), key=self.elements.__getitem__)
            better = min(self._exchanges(most, limit), default=None)
            if better is None:
                final.add(most)
                continue
            _, given, rank, taken = better
            self.remove(given)
            if taken >= 0:
                self.remove(taken)
                self.place(taken, most)
            self.place(given, rank)
            final.clear()

    def _exchanges(self, most: int, limit: float) -> Iterator[tuple[int, int, int, int]]:
        """(larger of the two ranks' elements afterwards, task given, to which rank, task taken or -1)."""
        nothing = Task(0, 0, ())
        for given in self._distinct(most):
            gift = self.tasks[given]
            for rank in gift.ranks:
                if self.elements[rank] >= self.elements[most]:
                    continue
                for taken in (-1, *self._distinct(rank)):
                    back = self.tasks[taken] if taken >= 0 else nothing
                    moved, cost = gift.elements - back.elements, gift.cost - back.cost
                    after = max(self.elements[most] - moved, self.elements[rank] + moved)
                    if (
                        after < self.elements[most]
                        and max(self.load[rank] + cost, self.load[most] - cost) <= limit
                        and (taken < 0 or most in back.ranks)
                    ):
                        yield after, given, rank, taken

    def _distinct(self, rank: int) -> list[int]:
        """One task of every kind that the rank has."""
        return list(
            {(self.tasks[i].cost, self.tasks[i].elements, self.tasks[i].ranks): i for i in self.held[rank]}.values()
        )
