"""Documents into rows of L tokens.

A document here is its tokens and the closing EOS. One longer than L is cut: full rows, and a remainder that packs like a
document. Every token appears exactly once, and in order within its document.

best_fit: best-fit decreasing over a window of documents. Pieces are taken longest first (ties: document order) and put
into the open row with the least space that still fits (ties: the row opened first), or a new row. Rows that are not nearly
full stay open for the next window, so windows cost no padding. About 1-2 M documents per CPU-second.
At most one slot in SHARE is padding, one row aside: where whole documents would leave more (all of them three fifths of a
row, say), the emptiest rows are taken apart again and fill the fullest ones, the last piece cut to fit.
whole: best_fit without cuts: documents longer than L are not for it, and as many slots are padding as they leave.
concat: documents one after another, cut wherever a row ends. pad: one piece a row.

How many pieces a row has is not limited unless `max_documents` says so, because of what document masks cost: nothing where
there are none; on a CPU S^2 bytes, whatever they show; on CUDA whole tiles of variable-length attention for each document. In
FlashAttention-2's tiles of 128 x 64 pairs, documents of n tokens cost as much as causal attention over 2 * 128 * 64 / n
tokens, hence never more than a plain row of 8,192 does. A limit turns rows of short documents into padding.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

OPEN_TOKENS = 4 << 20  # rows that may stay open between windows, in tokens of room: bounds the memory
SHARE = 128

Method = Literal["best_fit", "concat", "pad", "whole"]


class Piece(NamedTuple):
    """`length` tokens of document `document` from token `start` on (the EOS is token n of n + 1)."""

    document: int
    start: int
    length: int


@dataclass(slots=True)
class Row:
    pieces: list[Piece] = field(default_factory=list)
    used: int = 0
    goes_on: bool = False  # the last piece's document does, in another row: that piece stays last, where the row ends

    def add(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.used += piece.length

    def take(self) -> Piece:
        """Take the last piece out again."""
        piece = self.pieces.pop()
        self.used -= piece.length
        return piece


class Packer:
    """Feed windows of documents with `add`, then `finish`; each returns the rows that are complete.

    Document numbers are given by the caller and must increase; `open_documents` are those it has to keep for later rows.
    """

    def __init__(self, length: int, method: Method, max_documents: int | None = None) -> None:
        self.length = length
        self.method = method
        self.max_documents = length if max_documents is None else max_documents
        self._open: list[Row] = []
        self._slots = self._padding = 0  # of the rows that are done

    def add(self, first_document: int, lengths: Sequence[int]) -> list[Row]:
        """Documents first_document, first_document + 1, ... of `lengths` tokens (EOS included, so at least 1)."""
        documents = [(first_document + index, length) for index, length in enumerate(lengths) if length > 0]
        if self.method == "concat":
            return self._concat(documents)
        assert self.method != "whole" or max(lengths, default=0) <= self.length, "a document that has to be cut"
        full, pieces = [], []
        for document, length in documents:
            whole = length // self.length
            full += [Row([Piece(document, row * self.length, self.length)], self.length) for row in range(whole)]
            if length % self.length:
                pieces.append(Piece(document, whole * self.length, length % self.length))
        if self.method == "pad":
            return _in_order(full + [Row([piece], piece.length) for piece in pieces])
        self._count(full)
        return _in_order(full + self._best_fit(pieces))

    def finish(self) -> list[Row]:
        if self.method in ("best_fit", "whole"):
            return _in_order(self._release(0))
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
        done = [row for row in rows if not self._is_roomy(row)]
        self._count(done)
        self._open = [row for row in rows if self._is_roomy(row)]
        return done + self._release(max(1, OPEN_TOKENS // self.length))

    def _is_roomy(self, row: Row) -> bool:
        return row.used < self.length - self.length // SHARE and len(row.pieces) < self.max_documents

    def _count(self, rows: list[Row]) -> None:
        self._slots += len(rows) * self.length
        self._padding += sum(self.length - row.used for row in rows)

    def _release(self, keep: int) -> list[Row]:
        """Rows that cannot stay open, the fullest first; as they are while that leaves little padding in all, then filled."""
        rows = deque(sorted(self._open, key=lambda row: row.used))  # stable; the emptiest stay open
        done = []
        while len(rows) > keep:
            row = rows.pop()
            if (
                self.method == "best_fit"
                and rows
                and (self._padding + self.length - row.used) * SHARE > self._slots + self.length
            ):
                self._fill(row, rows)
            self._count([row])
            done.append(row)
        self._open = list(rows)
        return done

    def _fill(self, row: Row, donors: deque[Row]) -> None:
        """Move pieces of the emptiest rows into this one until it is full, the last one cut to fit."""
        while donors and row.used < self.length and len(row.pieces) < self.max_documents:
            piece, space = donors[0].take(), self.length - row.used
            if piece.length > space:
                donors[0].add(Piece(piece.document, piece.start + space, piece.length - space))
                piece = piece._replace(length=space)
                row.goes_on = True
            row.add(piece)
            if not donors[0].pieces:
                donors.popleft()

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
    """Rows by their first token in the corpus, pieces of a row in document order: neither depends on lengths then. A piece that
    was cut stays at the end of its row, or the next document would follow it without an EOS."""
    for row in rows:
        whole = len(row.pieces) - row.goes_on
        row.pieces[:whole] = sorted(row.pieces[:whole])
    return sorted(rows, key=lambda row: row.pieces[0])
