"""Rows that begin alike as a tree of spans, so that what they share goes through the network once.

Few-shot examples come before every question of a task, and a question before each of its answers. `share` cuts rows into
spans: a row's tokens are those of its leaf's ancestors and then its own. A span is shared where that saves more than
another pass costs; what is scored of a row always lies in its leaf. `passes` walks the tree, parents before children, and
`deal` gives every rank about the same number of tokens, repeating what is shared where a family is larger than a rank's part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress, count, groupby
from operator import ne
from typing import Any

Tokens = tuple[int, ...]

SHORTEST = 16  # tokens of a shared span
LEAST_SAVED = 64  # tokens that need not be run again


@dataclass(eq=False)
class Span:
    """Tokens `start` to `end` of a row; `row` is the number of the row that ends here, None where it goes on in children."""

    tokens: Tokens
    start: int
    end: int
    row: int | None = None
    children: list[Span] = field(default_factory=list)

    @property
    def own(self) -> Tokens:
        return self.tokens[self.start : self.end]

    def cost(self) -> int:
        """Tokens to be run, with its children's."""
        return self.end - self.start + sum(child.cost() for child in self.children)


@dataclass(eq=False)
class Pass:
    """Spans that go through the network together; `continues`: which of the parent pass's `kept` each goes on from."""

    spans: list[Span]
    parent: Pass | None
    continues: list[int]
    cache: Any = None  # of `kept`, left here by whoever runs the pass, gone with it

    @property
    def kept(self) -> list[int]:
        """Places of the spans that have children."""
        return [place for place, span in enumerate(self.spans) if span.children]

    @property
    def tokens(self) -> int:
        return sum(span.end - span.start for span in self.spans)


def share(rows: Sequence[tuple[Tokens, int]]) -> list[Span]:
    """The roots of the tree of rows: (tokens, how many at its end are not shared, at least one). No two rows are equal."""
    roots: list[Span] = []
    numbers = sorted(range(len(rows)), key=lambda number: rows[number][0])
    limits = [len(tokens) - alone for tokens, alone in rows]
    todo = [(numbers, 0, roots)]
    while todo:
        group, start, found = todo.pop()
        able = [number for number in group if limits[number] - start >= SHORTEST]
        if len(able) > 1:
            first, last = rows[able[0]][0], rows[able[-1]][0]
            common = min(start + common_length(first[start:], last[start:]), *(limits[number] for number in able))
            if common - start >= SHORTEST and (len(able) - 1) * (common - start) >= LEAST_SAVED:
                span = Span(first, start, common)
                found.append(span)
                todo.append((able, common, span.children))
            else:
                able = [number for number in able if limits[number] > common]
                for _, others in groupby(able, key=lambda number: rows[number][0][common]):
                    todo.append((list(others), start, found))
        else:
            able = []
        ends = set(group).difference(able)
        found += [Span(rows[number][0], start, len(rows[number][0]), row=number) for number in group if number in ends]
    return roots


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next(compress(count(), map(ne, first, second)), min(len(first), len(second)))


def passes(spans: Sequence[Span], most_tokens: int, parent: Pass | None = None) -> Iterator[Pass]:
    """All spans and what is below them, at most so many tokens a pass, padding counted (a longer span goes alone).

    Children follow before the next pass beside their parent, so few passes are kept at a time.
    """
    families = [list(spans)] if parent is None else [parent.spans[place].children for place in parent.kept]
    by_length = [sorted(family, key=lambda span: span.start - span.end) for family in families]
    order = sorted(range(len(families)), key=lambda index: max((len(span.own) for span in families[index]), default=0))
    waiting = [(index, span) for index in reversed(order) for span in by_length[index]]
    while waiting:
        fitting, width = 0, 0
        for _, span in waiting:
            width = max(width, span.end - span.start)
            if fitting and width * (fitting + 1) > most_tokens:
                break
            fitting += 1
        batch, waiting = waiting[:fitting], waiting[fitting:]
        made = Pass([span for _, span in batch], parent, [index for index, _ in batch])
        yield made
        if made.kept:
            yield from passes((), most_tokens, made)


def deal(roots: Sequence[Span], ranks: int) -> list[list[Span]]:
    """The spans of each rank; the same wherever it is asked."""
    if ranks == 1:
        return [list(roots)]
    most = sum(span.cost() for span in roots) // (2 * ranks)
    pieces = [
        (piece.cost(), number, piece) for number, piece in enumerate(p for root in roots for p in _cut(root, most))
    ]
    shares: list[dict[tuple[int, int, int], Span]] = [{} for _ in range(ranks)]
    loads = [0] * ranks
    for cost, _, piece in sorted(pieces, key=lambda piece: (-piece[0], piece[1])):
        lightest = loads.index(min(loads))
        begun = shares[lightest].setdefault((id(piece.tokens), piece.start, piece.end), piece)
        if begun is not piece:  # another part of the same family
            begun.children += piece.children
            cost -= len(piece.own)
        loads[lightest] += cost
    return [list(share.values()) for share in shares]


def _cut(span: Span, most: int) -> Iterator[Span]:
    """The span's family in parts of about `most` tokens, each with what they share."""
    if span.cost() <= most or not span.children:
        yield span
        return
    part, size = Span(span.tokens, span.start, span.end), span.end - span.start
    for child in (piece for whole in span.children for piece in _cut(whole, most)):
        if part.children and size + child.cost() > most:
            yield part
            part, size = Span(span.tokens, span.start, span.end), span.end - span.start
        part.children.append(child)
        size += child.cost()
    yield part
