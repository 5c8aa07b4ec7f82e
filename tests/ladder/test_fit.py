"""The fit against curves whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ladder.fit import LEVEL, PAPER_SHARE, Point, PowerLaw, extrapolate, fit, middle, share

COMPUTE = tuple(10.0**exponent for exponent in (12.0, 12.6, 13.3, 14.0))
laws = st.builds(PowerLaw, st.floats(2, 100), st.floats(0.02, 0.3))


def points(law: PowerLaw, noise: float = 0.0, seeds: int = 3, random: int = 0) -> list[Point]:
    draw = np.random.default_rng(random)
    return [
        Point(flops, law.loss(flops) * math.exp(noise * draw.normal()), seed)
        for flops in COMPUTE
        for seed in range(seeds)
    ]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(laws)
def test_a_curve_without_noise_is_found(law: PowerLaw) -> None:
    found = fit(points(law))
    assert found.law.exponent == pytest.approx(law.exponent, rel=1e-6)
    assert found.law.coefficient == pytest.approx(law.coefficient, rel=1e-5)
    assert found.law.flops(found.law.loss(3e13)) == pytest.approx(3e13)
    assert (found.exponent.low, found.exponent.high) == pytest.approx((law.exponent, law.exponent), rel=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(0.3, 0.95), st.floats(0.03, 0.2))
def test_the_share_of_compute_is_found(factor: float, exponent: float) -> None:
    """Of two laws with one exponent it is the same everywhere: what one needs more, the other needs less."""
    peer = PowerLaw(30.0, exponent)
    ours = PowerLaw(30.0 * factor**exponent, exponent)
    a, b = fit(points(ours)), fit(points(peer))
    for flops in (middle(points(peer)), 1e15):
        assert share(a, b, flops).value == pytest.approx(factor, rel=1e-4)
    assert share(b, a, 1e13).value == pytest.approx(1 / factor, rel=1e-4)


def test_the_papers_laws_give_the_papers_share() -> None:
    """2.506 C^-0.052 and 2.608 C^-0.054, C in PFLOP/s-days, over the compute of its models."""
    compute = [0.3, 1.0, 3.0]
    ours, peer = (
        fit([Point(flops, law.loss(flops), seed) for flops in compute for seed in (0, 1)])
        for law in (PowerLaw(2.506, 0.052), PowerLaw(2.608, 0.054))
    )
    assert share(ours, peer, 1.0).value == pytest.approx(PAPER_SHARE, abs=0.07)


def test_intervals_cover_what_is_true() -> None:
    """Of many noisy ladders nine in ten have the true exponent inside, less what three seeds a size leave out."""
    law, inside = PowerLaw(40.0, 0.08), 0
    for random in range(60):
        found = fit(points(law, noise=0.01, seeds=5, random=random), seed=random)
        inside += found.exponent.low <= law.exponent <= found.exponent.high
    assert 0.7 <= inside / 60 <= 1.0
    assert LEVEL == 0.9
    narrow, wide = (fit(points(law, noise, seeds=5)).exponent for noise in (0.002, 0.02))
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)
    one = fit(points(law, 0.01, seeds=1)).exponent  # of residuals
    assert one.low < one.high


def test_a_line_through_two_points_has_no_interval() -> None:
    a, b = (fit([Point(1e12, 4.0 + more, 0), Point(1e13, 3.0, 0)]) for more in (0.0, 0.1))
    assert (a.exponent.low, a.exponent.high, a.band(5e12).low) == (None, None, None)
    assert str(share(a, b, 1e12)).endswith("(no interval)")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(-0.5, 0.5), st.floats(1e-4, 1e-1))
def test_settings_beyond_what_was_measured(exponent: float, scale: float) -> None:
    flops = [1e12, 1e13, 1e14]
    assert extrapolate(flops, [scale * f**exponent for f in flops], 1e16) == pytest.approx(
        scale * 1e16**exponent, rel=1e-6
    )
    assert extrapolate([1e12], [0.01], 1e16) == 0.01


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(ValueError, match="two amounts of compute, there is 1; add sizes"):
        fit([Point(1e12, 4.0, 0), Point(1e12, 4.1, 1)])
    with pytest.raises(ValueError, match="does not fall with compute"):
        fit([Point(1e12, 4.0, 0), Point(1e13, 4.1, 0)])
