"""Work that is done again and again beside the main thread."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self


class Background:
    """`work` in a thread of its own while the `with` block lasts, and `finish` once it has ended.

    Daemon threads: a call that hangs holds up the end of the block for `patience_s`, and the process not at all.
    """

    def __init__(self, name: str, *, patience_s: float, first_s: float = 0.0) -> None:
        """first_s: seconds before the first `work`."""
        self.name, self.patience_s = name, patience_s
        self._first_s = first_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def work(self) -> float:
        """Returns the seconds until it is called again."""
        raise NotImplementedError

    def finish(self) -> None:
        """After the last `work`, in the same thread."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        self.join(self.patience_s)

    def end(self) -> None:
        """No further `work` begins."""
        self._ended.set()

    def join(self, seconds: float) -> bool:
        """Whether it has finished by then."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        wait = self._first_s
        while not self._ended.wait(wait):
            wait = self.work()
        self.finish()
