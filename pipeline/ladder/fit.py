"""Scaling laws from a ladder of runs: L(C) = (C / a)^-b with intervals, the compute that one optimizer saves, and the best settings.

Loss over training FLOPs is taken to be a power law, as Moonlight's paper fits it (arXiv 2502.16982, section 3.2: 2.506 C^-0.052 for
Muon and 2.608 C^-0.054 for AdamW, C in PFLOP/s-days): a straight line of log L over log C. Points of one size and optimizer with
several seeds are all used, so their spread is in the residuals.

Intervals come from a bootstrap of seeds inside each size: sizes are what was chosen, seeds are what chance did. With one seed the
residuals of the line are resampled instead; of one seed at two sizes there are none, and no interval.

The share of FLOPs that optimizer A needs for the loss that B reaches with C is C_A / C, where L_A(C_A) = L_B(C):

    share(C) = a_A (C / a_B)^(b_B / b_A) / C

at the geometric mean of the compute that was measured, where both lines are known best. The paper's is 0.52.

The best learning rate (sweep.py) is taken to be a power law of size, as DeepSeek LLM has it of C (arXiv 2401.02954, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000
LEVEL = 0.9  # of intervals
PAPER_SHARE = 0.52
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """One run."""

    flops: float  # of training, by pipeline/training/flops.py
    loss: float  # held out, nats per token
    seed: int


@dataclass(frozen=True)
class Interval:
    value: float
    low: float | None  # None: nothing to tell it by
    high: float | None

    def __str__(self) -> str:
        return f"{self.value:.3g} " + ("(no interval)" if self.low is None else f"({self.low:.3g} to {self.high:.3g})")

    def record(self) -> dict[str, float | None]:
        return asdict(self)


@dataclass(frozen=True)
class PowerLaw:
    """L = coefficient * C^-exponent."""

    coefficient: float
    exponent: float

    def loss(self, flops: float) -> float:
        return float(self.coefficient * flops**-self.exponent)

    def flops(self, loss: float) -> float:
        """That reach the loss."""
        return float((self.coefficient / loss) ** (1 / self.exponent))


@dataclass(frozen=True)
class Fit:
    law: PowerLaw
    exponent: Interval
    laws: tuple[PowerLaw, ...]  # of the bootstrap

    def band(self, flops: float) -> Interval:
        """The loss at a compute."""
        return _interval(self.law.loss(flops), [law.loss(flops) for law in self.laws])


def fit(points: Sequence[Point], seed: int = 0) -> Fit:
    """Raises ValueError for points of fewer than two sizes, or a loss that does not fall."""
    by_compute: dict[float, list[float]] = {}
    for point in points:
        by_compute.setdefault(point.flops, []).append(point.loss)
    if len(by_compute) < 2:
        raise ValueError(f"a power law needs runs of two amounts of compute, there is {len(by_compute)}; add sizes")
    x = np.log(np.array([flops for flops in sorted(by_compute) for _ in by_compute[flops]]))
    y = np.log(np.array([loss for flops in sorted(by_compute) for loss in by_compute[flops]]))
    (law,) = _lines(x, y[None])
    if law.exponent <= 0:
        raise ValueError("loss does not fall with compute: train the larger sizes longer, or tune their rate")
    seeds = [len(by_compute[flops]) for flops in sorted(by_compute)]
    told = min(seeds) > 1 or len(seeds) > 2
    laws = tuple(_lines(x, _draws(x, y, seeds, law, seed))) if told else ()
    return Fit(law, _interval(law.exponent, [each.exponent for each in laws]), laws)


def share(ours: Fit, peer: Fit, flops: float) -> Interval:
    """Of the peer's `flops` that we need for the peer's loss there."""

    def of(a: PowerLaw, b: PowerLaw) -> float:
        return a.flops(b.loss(flops)) / flops

    drawn = [of(a, b) for a, b in zip(ours.laws, peer.laws) if a.exponent > 0]
    return _interval(of(ours.law, peer.law), drawn)


def extrapolate(sizes: Sequence[float], settings: Sequence[float], wanted: float) -> float:
    """The best setting at another size, by a power law through the best ones of measured sizes; of one size its own."""
    if len(set(sizes)) < 2:
        return float(settings[0])
    slope, offset = np.polyfit(np.log(sizes), np.log(settings), 1)
    return float(np.exp(offset + slope * np.log(wanted)))


def middle(points: Sequence[Point]) -> float:
    """The geometric mean of their compute."""
    return float(np.exp(np.mean(np.log([point.flops for point in points]))))


def _lines(x: Array, y: Array) -> list[PowerLaw]:
    """Least squares of each row of `y` over `x`."""
    around = x - x.mean()
    slopes = (y - y.mean(axis=1, keepdims=True)) @ around / (around @ around)
    offsets = y.mean(axis=1) - slopes * x.mean()
    return [PowerLaw(float(np.exp(offset)), float(-slope)) for slope, offset in zip(slopes, offsets)]


def _draws(x: Array, y: Array, seeds: Sequence[int], law: PowerLaw, seed: int) -> Array:
    """[draws, points]"""
    random = np.random.default_rng(seed)
    expected = np.log(law.coefficient) - law.exponent * x
    if min(seeds) < 2:
        return np.asarray(expected + random.choice(y - expected, (DRAWS, len(y))))
    ends = np.cumsum(seeds)
    parts = [random.choice(y[end - count : end], (DRAWS, count)) for end, count in zip(ends, seeds)]
    return np.concatenate(parts, axis=1)


def _interval(value: float, drawn: Sequence[float]) -> Interval:
    if not drawn:
        return Interval(value, None, None)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
