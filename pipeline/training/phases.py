"""Where the time of a step went, on every rank, without a wait of the host.

A step lasts from the end of the one before it to its own end, and is cut into phases that follow each other:

    other       figures looked at, progress reported
    save        a checkpoint begun or waited for, after the step before or because its copy is not made yet
    data        waiting for the rows
    compute     forward and backward
    optimizer   norm, clipping, Muon, AdamW, router biases

and what compute and optimizer waited for other ranks is taken out of them and counted as `exchange` (parallel/exposed.py).
The marks between phases are the device's: on CUDA events of the computing stream, so that a wait for data that the device
did not notice, because it was still at work, counts as nothing.

Once the host knows the figures of a step, the device has passed all marks of it. Then they are read (`read`), and travel with the
next step's reduction (step.py), `VALUES` numbers a rank: two steps later rank 0 knows all ranks' times.
"""

from __future__ import annotations

import resource
import sys
from collections import deque
from typing import Any

import torch

from pipeline.parallel.exposed import Clock, Exposed, clock_of
from pipeline.training.times import PHASES, VALUES

RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of `ru_maxrss`, bytes


class Stopwatch:
    """Of one rank. `begin`, then `enter` whenever a phase ends, `lap` at the end of each step."""

    def __init__(self, device: torch.device, exposed: Exposed) -> None:
        self._device = device
        self._clock: Clock = clock_of(device)
        self._exposed = exposed
        self._marks: list[tuple[str, Any, list[tuple[Any, Any]]]] = []  # phase, its beginning, waits before it
        self._closed: deque[tuple[int, list[tuple[str, Any, list[tuple[Any, Any]]]]]] = deque()  # by step
        self._known: list[float] = [0.0] * VALUES
        self._steps: list[int] = []

    def begin(self) -> None:
        """The first step begins now."""
        self._exposed.start(self._clock)
        self._exposed.take()
        self._marks = [("other", self._clock.mark(), [])]

    def enter(self, phase: str) -> None:
        """What follows is `phase`."""
        self._marks.append((phase, self._clock.mark(), self._exposed.take()))

    def lap(self, step: int) -> None:
        """The step has been handed to the device, and the next one begins."""
        self.enter("other")
        self._closed.append((step, self._marks))
        self._marks = self._marks[-1:]

    def read(self, step: int) -> None:
        """The device has finished this step: its times are added to what `take` will give."""
        while self._closed and self._closed[0][0] <= step:
            number, marks = self._closed.popleft()
            for (phase, begin, _), (_, end, waits) in zip(marks, marks[1:]):
                waited = sum(self._seconds(*wait) for wait in waits)
                self._known[PHASES.index(phase)] += self._clock.seconds(begin, end) - waited
                self._known[PHASES.index("exchange")] += waited
                self._clock.free(begin)
            self._steps.append(number)

    def take(self) -> tuple[list[float], tuple[int, ...]]:
        """Seconds by phase and peak memory in bytes, summed over the steps that were read since the last call; these steps."""
        values, steps = self._known, tuple(self._steps)
        self._known, self._steps = [0.0] * VALUES, []
        values[-1] = float(self._memory()) if steps else 0.0
        return values, steps

    def _seconds(self, begin: Any, end: Any) -> float:
        found = self._clock.seconds(begin, end)
        self._clock.free(begin)
        self._clock.free(end)
        return found

    def _memory(self) -> int:
        """Bytes: of a GPU the peak since the last call, of a CPU the process's since it began."""
        if self._device.type != "cuda":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak
