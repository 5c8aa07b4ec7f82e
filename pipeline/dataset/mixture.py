"""Which source comes next: exact counts per block, by arithmetic.

Training positions of one lane are cut into blocks of M. In each block, source s appears exactly n_s times, where n is
the largest-remainder rounding of (weights * M). Where in the block is decided by a keyed permutation of the M slots, new
for every block. Lane l starts reading the block's pattern at slot (stride * l) mod M and wraps around, with
stride = max(1, M // lanes): so a batch over all lanes spreads over the whole pattern, and its mixture is near exact, too.
The ordinal of a position is how often its source came before it in the lane's block: lanes therefore walk
through each source in order of time, and no more than one window of it is ever open.

A stage of the mixture that is no whole number of blocks ends with one shorter block, rounded on its own; a `Segment` is a
run of equal blocks, so each stage is one or two segments. Counts before a segment are prefix sums: nothing is replayed.
Cost: one table of M x sources counts for each block touched, kept for the last few blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset.feistel import key_of, permute

Int64 = NDArray[np.int64]

_TABLES_KEPT = 64


class Stage(NamedTuple):
    """Weights of all sources (any positive scale) until lane position `end`; None: to the end of training."""

    weights: tuple[float, ...]
    end: int | None


@dataclass(frozen=True)
class Segment:
    """Equal blocks of `block` lane positions from lane position `start` on, with `counts[s]` positions of source s each."""

    start: int
    block: int
    counts: tuple[int, ...]
    before: tuple[int, ...]  # positions of each source in a lane before `start`


class _Table(NamedTuple):
    source: Int64  # [M] source of slot t
    before: Int64  # [M + 1, sources] how often each source occupies slots [0, t)


def largest_remainder(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Integers in proportion to the weights whose sum is `total`; ties go to the earlier source."""
    scale = total / sum(weights)
    shares = [weight * scale for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda s: (counts[s] - shares[s], s))
    for s in by_remainder[: total - sum(counts)]:
        counts[s] += 1
    assert sum(counts) == total
    return tuple(counts)


class Mixture:
    """The closed form: lane positions -> (source, per-lane position in that source)."""

    def __init__(self, stages: Sequence[Stage], block: int, lanes: int, seed: int) -> None:
        assert stages[-1].end is None, "the last stage is open"
        self.lanes = lanes
        self.seed = seed
        self.segments = _segments(stages, block)
        self._starts = np.array([segment.start for segment in self.segments], dtype=np.int64)
        self._tables: OrderedDict[tuple[int, int], _Table] = OrderedDict()

    def locate(self, lane: Int64, position: Int64) -> tuple[Int64, Int64]:
        """Source, and how many positions of that source the lane has used before this one."""
        source, ordinal = np.empty_like(position), np.empty_like(position)
        number = np.searchsorted(self._starts, position, side="right") - 1
        for k in np.unique(number):
            segment = self.segments[k]
            of_segment = np.flatnonzero(number == k)
            block, offset = np.divmod(position[of_segment] - segment.start, segment.block)
            counts, before = np.array(segment.counts, dtype=np.int64), np.array(segment.before, dtype=np.int64)
            for b in np.unique(block):
                here = np.flatnonzero(block == b)
                where = of_segment[here]
                table = self._table(int(k), int(b))
                first = self._first_slot(lane[where], segment.block)
                slot = (first + offset[here]) % segment.block
                s = table.source[slot]
                used = table.before[slot, s] - table.before[first, s] + np.where(slot < first, counts[s], 0)
                source[where] = s
                ordinal[where] = before[s] + b * counts[s] + used
        return source, ordinal

    def used(self, positions: Int64) -> Int64:
        """[lanes, sources]: how often each lane has drawn from each source in its first `positions[lane]` positions."""
        result = np.empty((self.lanes, len(self.segments[0].counts)), dtype=np.int64)
        number = np.searchsorted(self._starts, positions, side="right") - 1
        for lane, (k, position) in enumerate(zip(number, positions)):
            segment = self.segments[k]
            block, offset = divmod(int(position) - segment.start, segment.block)
            result[lane] = np.array(segment.before) + block * np.array(segment.counts)
            if offset:
                table = self._table(int(k), block)
                first = (lane * self._stride(segment.block)) % segment.block
                last = first + offset
                result[lane] += table.before[min(last, segment.block)] - table.before[first]
                if last > segment.block:
                    result[lane] += table.before[last - segment.block]
        return result

    def _stride(self, block: int) -> int:
        return max(1, block // self.lanes)

    def _first_slot(self, lane: Int64, block: int) -> Int64:
        return lane * self._stride(block) % block

    def _table(self, k: int, b: int) -> _Table:
        if (k, b) in self._tables:
            self._tables.move_to_end((k, b))
            return self._tables[k, b]
        segment = self.segments[k]
        order = permute(np.arange(segment.block), segment.block, key_of(self.seed, "mixture", segment.start, b))
        source = np.searchsorted(np.cumsum(segment.counts), order, side="right").astype(np.int64)
        before = np.zeros((segment.block + 1, len(segment.counts)), dtype=np.int64)
        np.cumsum(source[:, None] == np.arange(len(segment.counts)), axis=0, out=before[1:])
        self._tables[k, b] = _Table(source, before)
        if len(self._tables) > _TABLES_KEPT:
            self._tables.popitem(last=False)
        return self._tables[k, b]


def _segments(stages: Sequence[Stage], block: int) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    start, before = 0, np.zeros(len(stages[0].weights), dtype=np.int64)

    def append(length: int | None, size: int, weights: tuple[float, ...]) -> None:
        nonlocal start, before
        counts = largest_remainder(weights, size)
        segments.append(Segment(start, size, counts, tuple(int(count) for count in before)))
        if length is not None:
            start, before = start + length, before + (length // size) * np.array(counts, dtype=np.int64)

    for stage in stages:
        if stage.end is None:
            append(None, block, stage.weights)
            continue
        whole, rest = divmod(stage.end - start, block)
        if whole:
            append(whole * block, block, stage.weights)
        if rest:
            append(rest, rest, stage.weights)
    return tuple(segments)
