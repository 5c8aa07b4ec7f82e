"""Histograms of scores: numpy's counts, and the same ones whatever parts they are put together of."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.histogram import BINS, histogram, together

NUMBERS = st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=True)
ALIKE = st.floats(-1, 1).map(lambda value: 1e6 + value)
MANY = st.lists(NUMBERS | st.floats(0, 1) | st.integers(-5, 5).map(float), min_size=1) | st.lists(ALIKE, min_size=1)


@given(MANY)
@example([1.7976931348623157e308, -1.7976931348623157e308])
@example([0.0, -0.0, 5e-324])
@example([0.1] * 3)
def test_counts_are_numpys(values: list[float]) -> None:
    found = histogram(values)
    assert found is not None
    assert len(found.counts) <= BINS
    assert min(found.counts[0], found.counts[-1]) > 0
    width = 2.0**found.log2_width
    with np.errstate(over="ignore"):
        edges = np.array([*found.edges, np.inf])
        expected, _ = np.histogram(values, edges) if len(edges) > 2 else (np.array([len(values)]), None)
    assert found.counts == tuple(expected.tolist())
    if len(found.counts) > 1 and found.log2_width > -30 and max(map(abs, values)) < 1e100:  # no wider than need be
        half = np.floor(np.array(values) / (width / 2))
        assert half.max() - half.min() >= BINS or np.frexp(np.abs(values).max())[1] - 52 == found.log2_width


@given(MANY, st.lists(st.integers(0, 100)), st.randoms())
def test_of_parts_in_any_order(values: list[float], cuts: list[int], random: object) -> None:
    edges = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    parts = [histogram(values[start:stop]) for start, stop in zip(edges, edges[1:])]
    random.shuffle(parts)  # type: ignore[attr-defined]
    assert together(parts) == histogram(values)
    assert together([together(parts[:2]), *parts[2:]]) == histogram(values)


def test_of_nothing() -> None:
    assert histogram([]) is None
    assert together([None, histogram([])]) is None
