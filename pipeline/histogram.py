"""Histograms of numbers whose range nobody knows beforehand, made of parts in any order.

Bins are [k w, (k + 1) w) for whole k, and w is the least power of two at which BINS of them hold all numbers (and at which k is
exact in a float64). A bin of one width lies in one bin of twice the width, so the histogram of parts put together is, to the
last count, that of all their numbers at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from pipeline.manifest import Histogram

BINS = 40  # at most; more than half of them where numbers differ enough
FINEST = -30  # log2 of the least width: that of numbers that are all alike
EXACT_BITS = 52  # of k


def histogram(values: Sequence[float]) -> Histogram | None:
    """Of finite numbers; None of none."""
    if not values:
        return None
    low, high = min(values), max(values)
    log2_width = max(FINEST, math.frexp(max(abs(low), abs(high)))[1] - EXACT_BITS)
    while _bin(high, log2_width) - _bin(low, log2_width) >= BINS:
        log2_width += 1
    return _made(log2_width, Counter(_bin(value, log2_width) for value in values))


def together(parts: Iterable[Histogram | None]) -> Histogram | None:
    """That of the numbers of all parts; None of no numbers."""
    some = [part for part in parts if part is not None]
    if not some:
        return None
    log2_width = max(part.log2_width for part in some)
    total: Counter[int] = Counter()
    for part in some:
        for place, count in enumerate(part.counts, start=part.first):
            total[place >> log2_width - part.log2_width] += count
    while max(total) - min(total) >= BINS:
        log2_width += 1
        finer, total = total, Counter()
        for place, count in finer.items():
            total[place >> 1] += count
    return _made(log2_width, total)


def _bin(value: float, log2_width: int) -> int:
    scaled = math.ldexp(value, -log2_width)
    return math.floor(scaled) if scaled or value >= 0 else -1  # a number so small that its quotient is 0


def _made(log2_width: int, counts: Counter[int]) -> Histogram:
    first = min(counts)
    return Histogram(
        log2_width=log2_width, first=first, counts=tuple(counts[place] for place in range(first, max(counts) + 1))
    )
