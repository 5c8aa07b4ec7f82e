"""Sweeps of settings whose best one is known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ladder.sweep import best, beyond


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(-8, -3), st.floats(0.01, 1), st.integers(3, 6))
def test_the_best_setting_of_a_parabola(at: float, bend: float, count: int) -> None:
    rates = [math.exp(at) * 2.0 ** (index - count // 2 + 0.3) for index in range(count)]
    losses = [3 + bend * (math.log(rate) - at) ** 2 for rate in rates]
    inside = 0 < losses.index(min(losses)) < count - 1
    assert best(rates, losses) == pytest.approx(math.exp(at) if inside else rates[losses.index(min(losses))], rel=1e-6)


def test_an_end_of_a_sweep_is_the_best_known() -> None:
    assert best([1e-3, 2e-3, 4e-3], [3.0, 2.9, 2.8]) == pytest.approx(4e-3)
    assert best([4e-3], [3.0]) == pytest.approx(4e-3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(-5, 5), st.integers(2, 4))
def test_a_sweep_goes_on_until_its_best_is_inside(at: float, count: int) -> None:
    def loss(rate: float) -> float:
        return (math.log2(rate) - at) ** 2 if rate < 2.0 ** (at + 1.5) else math.inf  # diverges beyond

    rates = [2.0**index for index in range(count)]
    while (rate := beyond(rates, [loss(each) for each in rates])) is not None:
        assert rate not in rates
        rates.append(rate)
        assert len(rates) < 15
    found = best(rates, [loss(rate) for rate in rates])
    assert abs(math.log2(found) - at) <= 0.5 + 1e-9
    assert min(rates) < min(rates, key=loss) < max(rates)


def test_where_there_is_nothing_to_go_by() -> None:
    assert beyond([1.0], [3.0]) is None  # no sweep was asked for
    assert beyond([1.0, 2.0], [math.inf, math.inf]) == 0.5  # all diverged
    assert best([1.0, 2.0, 4.0], [3.1, 3.0, math.inf]) == pytest.approx(2.0)  # no parabola through what diverged
