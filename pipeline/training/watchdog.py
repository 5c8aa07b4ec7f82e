"""A heartbeat that ends a hung rank and says where it hung.

A collective that waits for a dead peer, or a storage call that never returns, would hold the whole group for the process group's
timeout or for ever, and Ray's health check does not see it: the worker's main thread still answers. The training loop tells
which phase it enters; a phase that lasts longer than its limit ends the process with status 1, so that the launcher restarts
the group from the last checkpoint.

    start, save    `training.step_timeout_s`
    step           that, or SLOWER times the median of the last steps once WARM of them are known, but never less than SHORTEST_S

Before it ends, a rank writes the stacks of its threads, with the phase and the step it got to, to

    <root>/runs/<run_id>/train/hangs/step-<step>/rank-<rank>.txt

with, where there is a process group, its last collectives in

    <root>/runs/<run_id>/train/hangs/flight-<step>/rank_<rank>

and waits for its peers to do the same (they hang in the same collective and notice within a moment), then prints who got least
far. That takes an interpreter that answers. A call that hangs holding the interpreter's lock is ended GRACE_S later by
`faulthandler.dump_traceback_later`, a C thread, with the stacks on stderr alone.
"""

from __future__ import annotations

import faulthandler
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from pipeline.storage import Storage

SLOWER = 20.0  # than the median step: a hang
WARM = 5  # steps, after which their median means something
REMEMBERED = 64  # steps
SHORTEST_S = 120.0  # no step is called hung sooner: a page cache that has to be filled, a noisy neighbour
PEERS_S = 10.0  # for the other ranks' stacks
GRACE_S = 60.0  # for stacks to reach storage
STDERR = 2  # the descriptor: `sys.stderr` may be a wrapper without one


class Watchdog:
    """`with Watchdog(...) as watchdog:` and then `watchdog.enter(phase, step)` whenever the loop goes on."""

    def __init__(
        self,
        timeout: float,
        storage: Storage | None = None,
        folder: str = "",
        rank: int = 0,
        world: int = 1,
        *,
        shortest: float = SHORTEST_S,
        leave: Callable[[int], object] = os._exit,
        collectives: Callable[[], bytes | None] = lambda: None,
    ) -> None:
        """timeout: seconds, of a phase that has no history. folder: for stacks, below the storage's root. collectives: the process's
        last ones, to be stored beside the stacks."""
        self.timeout = timeout
        self._storage, self._folder, self._rank, self._world = storage, folder, rank, world
        self._shortest = min(shortest, timeout)
        self._leave, self._collectives = leave, collectives
        self._steps: deque[float] = deque(maxlen=REMEMBERED)
        self._phase, self._step, self._entered = "start", 0, time.monotonic()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def enter(self, phase: str, step: int) -> None:
        """Now in this phase (start, step, save) of this step. A step that follows a step is timed."""
        now = time.monotonic()
        with self._changed:
            if phase == self._phase == "step" and step == self._step + 1:
                self._steps.append(now - self._entered)
            self._phase, self._step, self._entered = phase, step, now
            self._changed.notify()
        faulthandler.dump_traceback_later(self.limit() + GRACE_S, exit=True, file=STDERR)

    def limit(self) -> float:
        """Seconds that the present phase may take."""
        if self._phase != "step" or len(self._steps) < WARM:
            return self.timeout
        return min(self.timeout, max(self._shortest, SLOWER * statistics.median(self._steps)))

    def __enter__(self) -> Watchdog:
        self.enter("start", 0)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                left = self._entered + self.limit() - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
                where = f"rank {self._rank} hangs in {self._phase} of step {self._step}, for {time.monotonic() - self._entered:.0f} s"
                folder = f"{self._folder}/step-{self._step:08d}"
                break
            else:
                return
        stacks = _stacks()
        print(f"{where}\n{stacks}", file=sys.stderr, flush=True)
        try:
            if self._storage is not None:
                self._storage.write(f"{folder}/rank-{self._rank:05d}.txt", f"{where}\n{stacks}".encode())
                collectives = self._collectives()
                if collectives is not None:
                    self._storage.write(f"{self._folder}/flight-{self._step:08d}/rank_{self._rank}", collectives)
                print(self._least_far(folder), file=sys.stderr, flush=True)
        finally:
            self._leave(1)

    def _least_far(self, folder: str) -> str:
        """Waits for the stacks of all ranks; names those that did not write any, or else are not where most are."""
        assert self._storage is not None
        deadline = time.monotonic() + PEERS_S
        while True:
            ranks = {int(info.path[-9:-4]) for info in self._storage.list(folder)}
            missing = sorted(set(range(self._world)) - ranks)
            if not missing or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        where = self._storage.uri(folder)
        if missing:
            return f"no sign of ranks {missing}, which are dead, ahead or holding the interpreter's lock; stacks of the others: {where}"
        return f"all {self._world} ranks wait in this step; their stacks: {where}"


def _stacks() -> str:
    """Of all threads of this process, most recent call first. (The C function knows threads that Python does not.)"""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read().decode(errors="replace")
