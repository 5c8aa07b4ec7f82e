"""A heartbeat that ends a hung rank.

A collective that waits for a dead peer, or a storage call that never returns, would hold the whole group for the
process group's timeout or for ever, and Ray's health check does not see it: the worker's main thread still answers. The
training loop beats once a step; if a beat is more than `timeout` seconds away, every thread's stack is written to
stderr and the process exits with status 1, so that the launcher restarts the group from the last checkpoint.

The timer is `faulthandler.dump_traceback_later`: a C thread that needs no interpreter lock, so it fires even when the
hung call holds the lock. A process has one such timer; arming it again moves it.
"""

from __future__ import annotations

import faulthandler
from types import TracebackType

STDERR = 2  # the descriptor: `sys.stderr` may be a wrapper without one


class Watchdog:
    """`with Watchdog(seconds) as watchdog:` and then `watchdog.beat()` at least every `seconds`."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout

    def beat(self) -> None:
        faulthandler.dump_traceback_later(self.timeout, exit=True, file=STDERR)

    def __enter__(self) -> Watchdog:
        self.beat()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faulthandler.cancel_dump_traceback_later()
