"""Two halves of a micro-batch, one layer behind the other: while the rows of one travel, the other one computes.

A mixture layer pauses where its rows have left for their experts and where their results have left for home. Taken in turn, the
first half's rows travel behind the second half's attention, the second's behind the first's experts, and so both ways. Autograd
runs what was made last first, so backward takes the halves in turn as well, the other way round.

Every row gets what it gets alone: only sums over rows, gradients of weights and counts, are made of two parts.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

Result = TypeVar("Result")
Paused = Generator[None, None, Result]  # work that gives way where it would otherwise wait


def in_turn(*work: Paused[Result]) -> list[Result]:
    """What each piece of work returns, each run as far as its next pause in turn."""
    results: dict[int, Any] = {}
    while len(results) < len(work):
        for index, each in enumerate(work):
            if index not in results:
                try:
                    next(each)
                except StopIteration as end:
                    results[index] = end.value
    return [results[index] for index in range(len(work))]
