"""What a rehearsal writes down, in the order in which the host did it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

MAIN = "compute"  # the stream that kernels run on


@dataclass(frozen=True)
class Kernel:
    """Work on the device. `reads` and `writes` are (storage, bytes); the number of a storage is never used twice."""

    name: str
    kind: str  # which rate it goes by (rates.py): matmul, matmul_fp32, grouped, grouped_fp8, attention_forward, attention_backward, own, memory
    stream: str
    phase: str
    where: str
    flops: int
    reads: tuple[tuple[int, int], ...]
    writes: tuple[tuple[int, int], ...]

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.reads) + sum(size for _, size in self.writes)


@dataclass(frozen=True)
class Collective:
    """An exchange between the ranks of a group; it runs on the group's own stream, after what `stream` has queued."""

    name: str
    group: str
    ranks: tuple[int, ...]
    stream: str
    phase: str
    where: str
    dtype: str
    sent: int  # bytes that leave this rank
    number: int

    @property
    def own_stream(self) -> str:
        return f"wire: {self.group}"


@dataclass(frozen=True)
class Await:
    """`stream` goes on when the collective `number` has ended."""

    stream: str
    number: int


@dataclass(frozen=True)
class Mark:
    """An event: as far as `stream` is now."""

    number: int
    stream: str


@dataclass(frozen=True)
class AwaitMark:
    """`stream` goes on when the mark has been reached."""

    stream: str
    number: int


@dataclass(frozen=True)
class HostWait:
    """The host reads what the device computes, hence waits for all that `stream` has queued."""

    reason: str
    stream: str
    phase: str
    where: str


@dataclass(frozen=True)
class Begin:
    """From here on the tape is of micro-batch `micro`, or with -1 of what follows all of them."""

    micro: int


Entry = Begin | Kernel | Collective | Await | Mark | AwaitMark | HostWait


@dataclass
class Tape:
    entries: list[Entry] = field(default_factory=list)
    phase: str = "build"
    streams: list[str] = field(default_factory=lambda: [MAIN])  # the current one is last
    part: str = ""  # of the network, that the host is at work on
    running: bool = False
    _numbers: int = 0

    def add(self, entry: Entry) -> None:
        if self.running:
            self.entries.append(entry)

    def number(self) -> int:
        self._numbers += 1
        return self._numbers

    @property
    def stream(self) -> str:
        return self.streams[-1]

    @property
    def where(self) -> str:
        """The part of the network, or the function of the library that is at work outside of all parts."""
        return self.part or self.caller()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    @contextmanager
    def on(self, stream: str) -> Iterator[None]:
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams.pop()

    def caller(self) -> str:
        """The innermost function of the library that is at work, as file:function."""
        frame = sys._getframe(1)
        while frame is not None:
            name = frame.f_globals.get("__name__", "")
            if name.startswith("pipeline.") and not name.startswith("pipeline.rehearsal"):
                return f"{name.removeprefix('pipeline.')}:{frame.f_code.co_name}"
            frame = frame.f_back  # type: ignore[assignment]
        return "autograd"
