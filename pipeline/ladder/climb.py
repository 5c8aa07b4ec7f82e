"""Which runs a ladder needs, in three rounds, each decided by the one before.

    rates      at the TUNED smallest sizes, each optimizer at each rate of the sweep, one seed
    batches    at the smallest size and its best rate, each batch, if there are several
    seeds      every size, optimizer and seed at the rate that a power law through the best ones gives, and the best batch

Best rates beyond the tuned sizes are extrapolated, as a large run's would be.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.ladder.fit import Fit, Interval, Point, best, extrapolate, fit, middle, share
from pipeline.ladder.rungs import OPTIMIZERS, Rung

TUNED = 2
Measure = Callable[[Sequence[Rung]], dict[Rung, tuple[float, float]]]  # FLOPs and loss of each


@dataclass(frozen=True)
class Ladder:
    """What was asked for."""

    sizes: tuple[int, ...]
    rates: tuple[float, ...]  # times the recipe's
    batches: tuple[float, ...]
    seeds: int


@dataclass(frozen=True)
class Climbed:
    measured: dict[Rung, tuple[float, float]]
    points: dict[str, list[Point]]  # by optimizer, at its best settings
    fits: dict[str, Fit]
    rates: dict[str, dict[int, float]]  # by optimizer and size, times the recipe's
    batch: dict[str, float]
    share: Interval  # of AdamW's FLOPs that Muon needs
    at: float  # FLOPs, where the share is taken

    def record(self) -> dict[str, Any]:
        return {
            "runs": [{"rung": rung.name, "flops": f, "loss": loss} for rung, (f, loss) in self.measured.items()],
            "laws": {
                name: {"coefficient": fit.law.coefficient, "exponent": fit.law.exponent, "low": fit.exponent.low, "high": fit.exponent.high}
                for name, fit in self.fits.items()
            },
            "rates": {name: {str(size): rate for size, rate in sizes.items()} for name, sizes in self.rates.items()},
            "batch": self.batch,
            "share": {"value": self.share.value, "low": self.share.low, "high": self.share.high, "at_flops": self.at},
        }  # fmt: skip

    def to_json(self) -> bytes:
        return json.dumps(self.record(), indent=1).encode()


def climb(ladder: Ladder, measure: Measure) -> Climbed:
    """Raises ValueError for a ladder that cannot be fitted."""
    measured: dict[Rung, tuple[float, float]] = {}

    def run(rungs: Sequence[Rung]) -> None:
        measured.update(measure([rung for rung in rungs if rung not in measured]))

    tuned = ladder.sizes[:TUNED]
    run([Rung(name, size, rate) for size in tuned for rate in ladder.rates for name in OPTIMIZERS])
    rates: dict[str, dict[int, float]] = {}
    for name in OPTIMIZERS:
        found = {
            size: best(ladder.rates, [measured[Rung(name, size, rate)][1] for rate in ladder.rates]) for size in tuned
        }
        rates[name] = {
            size: found[size] if size in found else extrapolate(list(map(float, found)), list(found.values()), size)
            for size in ladder.sizes
        }
    small = ladder.sizes[0]
    batch = dict.fromkeys(OPTIMIZERS, ladder.batches[0])
    if len(ladder.batches) > 1:
        run([Rung(name, small, rates[name][small], each) for each in ladder.batches for name in OPTIMIZERS])
        for name in OPTIMIZERS:
            losses = [measured[Rung(name, small, rates[name][small], each)][1] for each in ladder.batches]
            batch[name] = ladder.batches[losses.index(min(losses))]
    last = {
        name: [Rung(name, size, rates[name][size], batch[name], seed) for size in ladder.sizes for seed in range(ladder.seeds)]
        for name in OPTIMIZERS
    }  # fmt: skip
    run([rung for rungs in last.values() for rung in rungs])
    points = {name: [Point(*measured[rung], rung.seed) for rung in rungs] for name, rungs in last.items()}
    fits = {name: fit(found) for name, found in points.items()}
    at = middle(points["adamw"])
    return Climbed(measured, points, fits, rates, batch, share(fits["muon"], fits["adamw"], at), at)
