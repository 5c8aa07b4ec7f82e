"""A line while nothing is said: whoever watches a command knows what it waits for, and that it is alive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from pipeline.workflow.duration import duration

QUIET_S = 10.0


class Heartbeat:
    """Prints `what` and how long it has gone on, when nothing was said for `QUIET_S`, while its `with` block runs.

    `clock` is in seconds; `what=""` says nothing. A thread of its own beats: the work may hang in a call.
    """

    def __init__(self, what: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # held while a line is printed: none comes after `begin`
        self._ended = threading.Event()
        self.begin(what)

    def __enter__(self) -> Heartbeat:
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.begin("")
        self._ended.set()

    def begin(self, what: str) -> None:
        """Something was said, and from now on `what` goes on."""
        with self._lock:
            self._what = what
            self._began = self._said = self._clock()

    def beat(self) -> None:
        with self._lock:
            now = self._clock()
            if self._what and now - self._said >= QUIET_S:
                print(f"{self._what}, {duration(now - self._began)}", flush=True)
                self._said = now

    def _run(self) -> None:
        while not self._ended.wait(1.0):
            self.beat()
