"""Which runs a ladder needs, in three rounds, each decided by the one before.

    rates      at the smallest sizes (`tuned` of them), each optimizer at each rate of the sweep, one seed; a sweep whose best rate
               is its end goes on there
    batches    at the smallest size and its best rate, each batch, if there are several
    seeds      every size, optimizer and seed: at its own best rate where that was swept, else at the rate that a power law through
               the best ones gives, as a large run's would be; and at the best batch

Runs of a size, batch and seed start from the same weights and see the same rows, whatever their optimizer and rate. That is asserted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.ladder.fit import Fit, Interval, Point, extrapolate, fit, middle, share
from pipeline.ladder.rungs import OPTIMIZERS, Measured, Rung
from pipeline.ladder.sweep import best, beyond

WIDER = 10  # times that a sweep goes on
Measure = Callable[[Sequence[Rung]], dict[Rung, Measured]]
Run = Callable[[Sequence[Rung]], None]
Losses = Callable[[Sequence[Rung]], list[float]]


@dataclass(frozen=True)
class Ladder:
    """What was asked for."""

    sizes: tuple[int, ...]  # ascending
    rates: tuple[float, ...]  # times the recipe's
    batches: tuple[float, ...]
    seeds: int
    tuned: int = 2  # of the smallest sizes


@dataclass(frozen=True)
class Climbed:
    measured: dict[Rung, Measured]
    swept: dict[str, dict[int, list[float]]]  # rates by optimizer and size, times the recipe's, at its first batch
    seeds: dict[str, list[Rung]]  # by optimizer: the runs at its best settings, which are fitted
    fits: dict[str, Fit]
    rates: dict[str, dict[int, float]]  # by optimizer and size, times the recipe's
    batch: dict[str, float]
    share: Interval  # of AdamW's FLOPs that Muon needs
    at: float  # FLOPs, where the share is taken

    def points(self, optimizer: str) -> list[Point]:
        return _points(self.seeds[optimizer], self.measured)

    def record(self) -> dict[str, Any]:
        return {
            "runs": [
                {"rung": rung.name, "flops": found.flops, "loss": found.loss if math.isfinite(found.loss) else None}
                for rung, found in self.measured.items()
            ],
            "laws": {
                name: {"coefficient": fit.law.coefficient, "exponent": fit.exponent.record()}
                for name, fit in self.fits.items()
            },
            "rates": {name: {str(size): rate for size, rate in sizes.items()} for name, sizes in self.rates.items()},
            "batch": self.batch,
            "share": {**self.share.record(), "at_flops": self.at},
        }  # fmt: skip

    def to_json(self) -> bytes:
        return json.dumps(self.record(), indent=1).encode()


def climb(ladder: Ladder, measure: Measure) -> Climbed:
    """Raises ValueError for a ladder that cannot be fitted."""
    measured: dict[Rung, Measured] = {}

    def run(rungs: Sequence[Rung]) -> None:
        measured.update(measure([rung for rung in dict.fromkeys(rungs) if rung not in measured]))

    def losses(rungs: Sequence[Rung]) -> list[float]:
        return [measured[rung].loss for rung in rungs]

    tried = _sweep(ladder, run, losses)
    rates = _best_rates(ladder, tried, losses)
    small = ladder.sizes[0]
    batch = dict.fromkeys(OPTIMIZERS, ladder.batches[0])
    if len(ladder.batches) > 1:
        batches = {
            name: [Rung(name, small, rates[name][small], each) for each in ladder.batches] for name in OPTIMIZERS
        }
        run([rung for rungs in batches.values() for rung in rungs])
        for name, rungs in batches.items():
            batch[name] = min(rungs, key=lambda rung: measured[rung].loss).batch
    seeds = {
        name: [Rung(name, size, rates[name][size], batch[name], seed) for size in ladder.sizes for seed in range(ladder.seeds)]
        for name in OPTIMIZERS
    }  # fmt: skip
    run([rung for rungs in seeds.values() for rung in rungs])
    _check_pairs(measured)
    fits = {name: fit(_points(rungs, measured)) for name, rungs in seeds.items()}
    at = middle(_points(seeds["adamw"], measured))
    return Climbed(measured, tried, seeds, fits, rates, batch, share(fits["muon"], fits["adamw"], at), at)


def _sweep(ladder: Ladder, run: Run, losses: Losses) -> dict[str, dict[int, list[float]]]:
    """Raises ValueError for one that begins too far away."""
    tried = {name: {size: list(ladder.rates) for size in ladder.sizes[: ladder.tuned]} for name in OPTIMIZERS}
    for _ in range(WIDER + 1):
        run([rung for name, sizes in tried.items() for size in sizes for rung in _at_rates(name, size, sizes[size])])
        further = {
            (name, size): rate
            for name, sizes in tried.items()
            for size, rates in sizes.items()
            if (rate := beyond(rates, losses(_at_rates(name, size, rates)))) is not None
        }
        if not further:
            return tried
        for (name, size), rate in further.items():
            tried[name][size].append(rate)
    raise ValueError(
        f"--rates: {name} at hidden size {size} is still best at the end of its sweep; begin at {rate:g} times the recipe's"
    )


def _best_rates(
    ladder: Ladder, tried: dict[str, dict[int, list[float]]], losses: Losses
) -> dict[str, dict[int, float]]:
    """By optimizer and size."""
    found = {}
    for name, sizes in tried.items():
        own = {size: best(rates, losses(_at_rates(name, size, rates))) for size, rates in sizes.items()}
        law = list(map(float, own)), list(own.values())
        found[name] = {size: own[size] if size in own else extrapolate(*law, size) for size in ladder.sizes}
    return found


def _at_rates(name: str, size: int, rates: Sequence[float]) -> list[Rung]:
    return [Rung(name, size, rate) for rate in rates]


def _points(rungs: Sequence[Rung], measured: dict[Rung, Measured]) -> list[Point]:
    """Raises ValueError for a run that diverged."""
    for rung in rungs:
        if not math.isfinite(measured[rung].loss):
            raise ValueError(
                f"{rung.name} diverged at the rate that the smaller sizes give: raise --tuned, so that its size is swept as well"
            )
    return [Point(measured[rung].flops, measured[rung].loss, rung.seed) for rung in rungs]


def _check_pairs(measured: dict[Rung, Measured]) -> None:
    """The loss of the first step, before any update, is a function of initial weights and data alone."""
    first: dict[tuple[int, float, int], tuple[Rung, Measured]] = {}
    for rung, found in measured.items():
        if found.beginning is None:
            continue
        other, its = first.setdefault((rung.hidden, rung.batch, rung.seed), (rung, found))
        assert its.beginning is not None
        same = math.isclose(found.beginning.loss, its.beginning.loss, rel_tol=1e-4)
        assert same, f"{rung.name} and {other.name} start from different weights"
        assert found.beginning.order_digest == its.beginning.order_digest, (
            f"{rung.name} and {other.name} see different data"
        )
