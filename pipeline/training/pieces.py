"""The pieces of a stored tensor, read once from front to back, and any box of the tensor put together from them as it is read.

A piece is checked against its checksum when its last byte has been read, so bytes that a box has no use for are read, too. Nothing
is held but a block of each piece at hand, which stays in a core's cache between reading, hashing and whatever is done with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import product
from math import prod
from operator import attrgetter

import xxhash

from pipeline.training.commits import DamagedCheckpoint
from pipeline.training.content import BLOCK

Read = Callable[[int, memoryview], int]  # fills memory from a byte of the file on and says how far it got


@dataclass(frozen=True)
class Piece:
    """Where a box of a tensor lies, and what its bytes are."""

    file: str
    start: int
    bytes: int
    xxh3: str
    block: int = (
        0  # bytes of a block, the last one may be shorter; 0: one checksum that went from block to block (format 2)
    )
    row_sum: int = 0  # its share of the tensor's sum (content.py); known while saving


class PieceReader:
    """The bytes of a piece in order, block by block. `where` begins the message of DamagedCheckpoint; without `check` nothing is
    hashed."""

    def __init__(self, piece: Piece, read: Read, where: str, *, check: bool = True) -> None:
        self._piece, self._read, self._where, self._check = piece, read, where, check
        self._step = piece.block or BLOCK
        self._hash = xxhash.xxh3_128()
        self._block = memoryview(b"")  # the one that was read last, where `parts` reads
        self._end = 0  # of what was read, in the piece

    def into(self, target: memoryview) -> None:
        """Fill `target` with the whole piece. Raises DamagedCheckpoint if it is not as it was written."""
        while self._end < self._piece.bytes:
            self._next(target[self._end : self._end + self._step])
        self.finish()

    def parts(self, start: int, stop: int) -> Iterator[memoryview]:
        """Bytes `start` to `stop` in parts that are valid until the next one; those before `start` are read and passed over.
        Raises DamagedCheckpoint if the file ends before."""
        while start < stop:
            while self._end <= start:
                self._read_block()
            part = self._block[start - self._end : stop - self._end if stop < self._end else None]
            yield part
            start += len(part)

    def finish(self) -> None:
        """Read what is left. Raises DamagedCheckpoint if the piece is not as it was written."""
        while self._end < self._piece.bytes:
            self._read_block()
        if self._check and self._hash.hexdigest() != self._piece.xxh3:
            end = self._piece.start + self._piece.bytes
            raise DamagedCheckpoint(
                f"{self._where}: bytes {self._piece.start} to {end} have xxh3 {self._hash.hexdigest()}, "
                f"written as {self._piece.xxh3}"
            )

    def _read_block(self) -> None:
        size = min(self._step, self._piece.bytes - self._end)
        if len(self._block) < size:
            self._block = memoryview(bytearray(size))
        self._block = self._block[:size]  # only the last one is shorter
        self._next(self._block)

    def _next(self, block: memoryview) -> None:
        """Fill `block`, which is one, with the bytes that come next."""
        done = 0
        while done < len(block):
            count = self._read(self._piece.start + self._end, block[done:])
            if not count:
                raise DamagedCheckpoint(
                    f"{self._where}: the file ends at byte {self._piece.start + self._end} inside of it, "
                    f"{self._piece.bytes - self._end} bytes are missing"
                )
            done += count
            self._end += count
        if self._check:
            self._hash.update(xxhash.xxh3_128_digest(block) if self._piece.block else block)


@dataclass(frozen=True)
class Run:
    """Numbers that follow one another in the box and in one piece of the tensor."""

    place: int  # of the first, in the box
    piece: int  # which
    start: int  # of the first, in the piece
    count: int


def runs_of_box(
    offsets: Sequence[int], sizes: Sequence[int], pieces: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Iterator[Run]:
    """The box at `offsets` from its first number to its last, from pieces of (offsets, sizes) that do not overlap. Runs of one piece
    go forward in it, too."""
    each = (_runs(offsets, sizes, number, *piece) for number, piece in enumerate(pieces))
    return merge(*each, key=attrgetter("place"))


def _runs(
    offsets: Sequence[int], sizes: Sequence[int], number: int, at: Sequence[int], extent: Sequence[int]
) -> Iterator[Run]:
    first = [max(pair) for pair in zip(offsets, at)]
    shared = [min(o + s, a + e) - f for o, s, a, e, f in zip(offsets, sizes, at, extent, first)]
    if any(length <= 0 for length in shared):
        return
    outer = len(sizes)  # dims before this one are walked through, those from it on follow one another in both
    while outer and all(shared[dim] == sizes[dim] == extent[dim] for dim in range(outer, len(sizes))):
        outer -= 1
    count = prod(shared[outer:])
    for indices in product(*(range(length) for length in shared[:outer])):
        inside = (*indices, *(0 for _ in shared[outer:]))
        place = _flat([f - o + i for f, o, i in zip(first, offsets, inside)], sizes)
        start = _flat([f - a + i for f, a, i in zip(first, at, inside)], extent)
        yield Run(place, number, start, count)


def _flat(index: Sequence[int], sizes: Sequence[int]) -> int:
    found = 0
    for each, size in zip(index, sizes):
        found = found * size + each
    return found
