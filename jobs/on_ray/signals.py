"""SIGINT and SIGTERM as an exception of the main thread."""

from __future__ import annotations

import signal
from types import FrameType


class Interrupted(BaseException):
    """SIGINT or SIGTERM; carries the signal's number."""

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.args[0]).name}; run the same command to go on"

    @property
    def exit_code(self) -> int:
        return 128 + int(self.args[0])


def raise_on_signals() -> None:
    """Raise Interrupted in the main thread. After `ray.init`, which has a handler of its own."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
