"""Steps whose rows travel in buffers of fixed size, and what happens to one that they were too small for.

With `training.expert_capacity` no layer waits for counts (pipeline/parallel/bounded.py). A step that would need more room ends
in a loss that is not finite and changes nothing. It is then computed again with buffers that fit what is in them, which
gives the bits of a run without the setting; so does every step that did fit. The setting decides how fast a run is, never
what it learns, and may be changed at any restart.

The host has to know before the next step begins whether this one happened: it waits once, behind the step, where without the setting
it waits in every layer. Routing that needs more room once tends to do so again, so the next steps take buffers that fit
at once: `FIRST_PAUSE` of them, twice as many each time the first step with fixed buffers fails again, up to `LONGEST_PAUSE`.
All ranks see the same loss and do the same.
"""

from __future__ import annotations

import logging

from torch import Tensor

from pipeline.parallel.bounded import Room

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 8, 1024  # steps


class FixedRoom:
    """Of one run: asked before each step, told after it. `repeated`: steps that were computed twice."""

    def __init__(self, room: Room, *, tell: bool = True) -> None:
        self.room = room
        self.tell = tell
        self.repeated = 0
        self._pause = FIRST_PAUSE
        self._left = 0  # steps of the pause

    def begin(self) -> bool:
        """A step begins; whether it takes buffers of fixed size."""
        self.room.fixed = self._left == 0
        self._left = max(self._left - 1, 0)
        return self.room.fixed

    def sufficed(self, finite: Tensor) -> bool:
        """Whether the step with fixed buffers happened; if not, compute it again. The host waits for the device."""
        if bool(finite):
            self._pause = FIRST_PAUSE
            return True
        self.room.fixed = False
        self.repeated += 1
        self._left, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        if self.tell:
            log.warning(
                "routing needs more room than training.expert_capacity %g sets aside (or the loss is not finite): the step is computed "
                "again with buffers that fit, and so are the next %d",
                self.room.capacity,
                self._left,
            )
        return False
