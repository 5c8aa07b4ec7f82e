"""Documents into rows of L tokens.

A document here is its tokens and the closing EOS. One longer than L is cut: full rows, and a remainder that packs like a
document. Every token appears exactly once, and in order within its document.

best_fit: best-fit decreasing over a window of documents. Pieces are taken longest first (ties: document order) and put
into the open row with the least space that still fits (ties: the row opened first), or a new row. Rows that are not nearly
full stay open for the next window, so windows cost no padding. About 1-2 M documents per CPU-second.
concat: documents one after another, cut wherever a row ends. pad: one piece a row.
No row has more than `max_documents` pieces: hundreds of tiny documents would make one row's attention the slowest.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

OPEN_TOKENS = 4 << 20  # rows that may stay open between windows, in tokens of room: bounds the memory

Method = Literal["best_fit", "concat", "pad"]


class Piece(NamedTuple):
    """`length` tokens of document `document` from token `start` on (the EOS is token n of n + 1)."""

    document: int
    start: int
    length: int


@dataclass(slots=True)
class Row:
    pieces: list[Piece] = field(default_factory=list)
    used: int = 0

    def add(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.used += piece.length


class Packer:
    """Feed windows of documents with `add`, then `finish`; each returns the rows that are complete.

    Document numbers are given by the caller and must increase; `open_documents` are those it has to keep for later rows.
    """

    def __init__(self, length: int, method: Method, max_documents: int) -> None:
        self.length = length
        self.method = method
        self.max_documents = max_documents
        self._open: list[Row] = []

    def add(self, first_document: int, lengths: Sequence[int]) -> list[Row]:
        """Documents first_document, first_document + 1, ... of `lengths` tokens (EOS included, so at least 1)."""
        documents = [(first_document + index, length) for index, length in enumerate(lengths) if length > 0]
        if self.method == "concat":
            return self._concat(documents)
        full, pieces = [], []
        for document, length in documents:
            whole = length // self.length
            full += [Row([Piece(document, row * self.length, self.length)], self.length) for row in range(whole)]
            if length % self.length:
                pieces.append(Piece(document, whole * self.length, length % self.length))
        if self.method == "pad":
            return _in_order(full + [Row([piece], piece.length) for piece in pieces])
        done = self._best_fit(pieces)
        return _in_order(full + done)

    def finish(self) -> list[Row]:
        rows, self._open = self._open, []
        return _in_order(rows)

    @property
    def open_documents(self) -> set[int]:
        return {piece.document for row in self._open for piece in row.pieces}

    def _best_fit(self, pieces: list[Piece]) -> list[Row]:
        pieces.sort(key=lambda piece: (-piece.length, piece.document))
        rows = self._open
        by_space: dict[int, list[int]] = {}  # free tokens -> indices of open rows, smallest first
        spaces: list[int] = []  # the keys of by_space, sorted

        def put(index: int) -> None:
            space = self.length - rows[index].used
            if space and len(rows[index].pieces) < self.max_documents:
                if space not in by_space:
                    by_space[space] = []
                    insort(spaces, space)
                insort(by_space[space], index)

        for index in range(len(rows)):
            put(index)
        for piece in pieces:
            at = bisect_left(spaces, piece.length)
            if at == len(spaces):
                rows.append(Row())
                index = len(rows) - 1
            else:
                space = spaces[at]
                index = by_space[space].pop(0)
                if not by_space[space]:
                    del by_space[space], spaces[at]
            rows[index].add(piece)
            put(index)
        nearly_full = self.length - self.length // 64
        roomy = [row for row in rows if row.used < nearly_full and len(row.pieces) < self.max_documents]
        roomy.sort(key=lambda row: row.used)  # stable; the emptiest stay open
        self._open = roomy[: max(1, OPEN_TOKENS // self.length)]
        kept = {id(row) for row in self._open}
        return [row for row in rows if id(row) not in kept]

    def _concat(self, documents: list[tuple[int, int]]) -> list[Row]:
        rows = self._open or [Row()]
        for document, length in documents:
            start = 0
            while start < length:
                if rows[-1].used == self.length or len(rows[-1].pieces) == self.max_documents:
                    rows.append(Row())
                take = min(length - start, self.length - rows[-1].used)
                rows[-1].add(Piece(document, start, take))
                start += take
        self._open = [rows[-1]] if rows[-1].used else []
        return rows[:-1]


def _in_order(rows: list[Row]) -> list[Row]:
    """Rows by their first token in the corpus, pieces of a row in document order: neither depends on lengths then."""
    for row in rows:
        row.pieces.sort()
    return sorted(rows, key=lambda row: row.pieces[0])
