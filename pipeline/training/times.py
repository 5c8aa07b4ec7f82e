"""The ranks' times as rank 0 tells them: the mean of each phase, and the rank that the others wait for.

A rank that is slow makes the others wait: its own time without the waiting (`exchange`) is the longest. So the slowest rank is the
one with the most time outside of `exchange`, its phase the one that exceeds the mean of the other ranks most, and by how much is
said in seconds a step. With one rank there is nobody to be slower than.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

PHASES = ("data", "compute", "exchange", "optimizer", "save", "other")
VALUES = len(PHASES) + 1  # numbers a rank: seconds by phase, and the peak of its memory in bytes


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step, mean over `steps` (step numbers) and over ranks; they add up to `seconds`."""

    steps: tuple[int, ...] = ()  # none: not known yet
    seconds: float = math.nan
    seconds_data: float = math.nan
    seconds_compute: float = math.nan
    seconds_exchange: float = math.nan
    seconds_optimizer: float = math.nan
    seconds_save: float = math.nan
    seconds_other: float = math.nan
    slowest_rank: int = -1  # none: one rank, or not known
    slowest_phase: str = ""
    slowest_seconds: float = math.nan  # a step, more than the mean of the other ranks
    memory_peak_bytes: float = math.nan  # of the rank that has the most

    def record(self) -> dict[str, Any]:
        """For JSON: what is not known is null."""
        found: dict[str, Any] = {
            "first_step": min(self.steps, default=None),
            "last_step": max(self.steps, default=None),
        }
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            found[field.name] = value if not isinstance(value, float) or math.isfinite(value) else None
        return found


UNKNOWN = StepTimes()


class TimesOfRanks:
    """Sums by rank until somebody asks."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._begin()

    def _begin(self) -> None:
        self._seconds = [[0.0] * len(PHASES) for _ in range(self._ranks)]
        self._memory = 0.0
        self._steps: list[int] = []

    def add(self, steps: Sequence[int], values: Sequence[float]) -> None:
        """`values`: `VALUES` numbers of each rank in turn, sums over `steps`."""
        assert len(values) == self._ranks * VALUES, (len(values), self._ranks)
        for rank, sums in enumerate(self._seconds):
            *seconds, memory = values[rank * VALUES : (rank + 1) * VALUES]
            for index, more in enumerate(seconds):
                sums[index] += more
            self._memory = max(self._memory, memory)
        self._steps += steps

    def take(self) -> StepTimes:
        """What was added since the last call."""
        if not self._steps:
            return UNKNOWN
        count = len(self._steps)
        by_rank = [[seconds / count for seconds in sums] for sums in self._seconds]
        means = [sum(column) / self._ranks for column in zip(*by_rank)]
        found = _filled(tuple(self._steps), means, slowest(by_rank), self._memory)
        self._begin()
        return found


def _filled(steps: tuple[int, ...], means: Sequence[float], slow: tuple[int, str, float], memory: float) -> StepTimes:
    data, compute, exchange, optimizer, save, other = means
    rank, phase, more = slow
    return StepTimes(steps, sum(means), data, compute, exchange, optimizer, save, other, rank, phase, more, memory)


def slowest(by_rank: Sequence[Sequence[float]]) -> tuple[int, str, float]:
    """(rank, phase, seconds more than the mean of the others) from each rank's seconds by phase."""
    ranks = len(by_rank)
    if ranks == 1:
        return -1, "", math.nan
    own = [index for index, phase in enumerate(PHASES) if phase != "exchange"]
    rank = max(range(ranks), key=lambda each: sum(by_rank[each][index] for index in own))
    sums = {index: sum(row[index] for row in by_rank) for index in own}
    excess = {i: by_rank[rank][i] - (total - by_rank[rank][i]) / (ranks - 1) for i, total in sums.items()}
    worst = max(excess, key=lambda index: excess[index])
    return rank, PHASES[worst], excess[worst]
