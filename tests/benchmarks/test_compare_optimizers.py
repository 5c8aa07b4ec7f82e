"""The comparison is only worth its result if the two runs of a pair differ in nothing but the optimizer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.compare_optimizers import RATE, called_for, check_pairs, configure, planned
from benchmarks.compare_report import Contender, Curve, best_rate, passes, results
from pipeline.optim.schedule import at_step, total_steps

STEPS = 60


def settings(run: Contender) -> dict[str, Any]:
    values = configure(run, STEPS, "somewhere", "0" * 64).model_dump(mode="json")
    return {f"{section}.{key}": value for section in values if isinstance(values[section], dict) for key, value in values[section].items()} | {
        key: value for key, value in values.items() if not isinstance(value, dict)
    }  # fmt: skip


def differing(one: Contender, other: Contender) -> set[str]:
    mine, theirs = settings(one), settings(other)
    assert mine.keys() == theirs.keys()
    return {key for key in mine if mine[key] != theirs[key]}


def curve(*losses: float, first_loss: float = 8.3) -> Curve:
    return Curve(tuple(range(10, 10 * len(losses) + 1, 10)), losses, first_loss, "order")


def test_a_pair_differs_in_the_optimizer_alone() -> None:
    muon = Contender("muon", 96, RATE)
    assert differing(muon, replace(muon, optimizer="adamw")) == {"run_id", "optimizer.name"}
    assert differing(muon, replace(muon, rate=RATE / 2)) == {"run_id", "schedule.learning_rate"}


def test_the_schedule_warms_up_to_the_rate_and_ends_at_a_tenth_of_it() -> None:
    config = configure(Contender("muon", 96, RATE), STEPS, "somewhere", "0" * 64)
    steps = [at_step(config.schedule, config.training.sequence_length, step) for step in range(STEPS)]
    assert total_steps(config.schedule, config.training.sequence_length) == STEPS
    assert steps[0].learning_rate == pytest.approx(RATE / 6)
    assert max(steps, key=lambda step: step.learning_rate).step == 5
    assert steps[5].learning_rate == RATE
    assert steps[-1].learning_rate == RATE / 10
    assert [step.bias_rate for step in steps].index(0.0) == 48


def test_a_run_is_named_by_everything_that_decides_its_loss() -> None:
    muon = Contender("muon", 96, RATE)
    names = {
        configure(run, steps, "somewhere", data).run_id
        for run in (muon, replace(muon, optimizer="adamw"), replace(muon, rate=RATE / 2), replace(muon, hidden=160))
        for steps in (STEPS, 2 * STEPS)
        for data in ("0" * 64, "1" * 64)
    }
    assert len(names) == 16
    assert configure(muon, STEPS, "elsewhere", "0" * 64).run_id in names


def test_both_are_swept_at_the_smallest_size_alone() -> None:
    runs = planned([96, 160])
    for name in ("muon", "adamw"):
        assert [run.rate / RATE for run in runs if run.optimizer == name and run.hidden == 96] == [0.5, 1.0, 2.0]
        assert [run.rate / RATE for run in runs if run.optimizer == name and run.hidden == 160] == [1.0]


@pytest.mark.parametrize(
    ("losses", "wanted"),  # final losses at 1/2, 1, 2 times the rate; what follows, as (size, multiple)
    [
        ((5.0, 4.0, 3.9), [(96, 4.0)]),
        ((3.9, 4.0, 5.0), [(96, 0.25)]),
        ((5.0, 4.0, 4.1), []),  # the preset's rate is the best: those runs are planned anyway
        ((5.0, 4.0), []),  # not finished
    ],
)
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_sweep_goes_on_until_its_best_rate_is_inside(
    name: str, losses: tuple[float, ...], wanted: list[tuple[int, float]]
) -> None:
    known = planned([96, 160])
    curves = {Contender(name, 96, RATE * factor): curve(loss) for factor, loss in zip((0.5, 1.0, 2.0), losses)}
    assert called_for(curves, known, [96, 160]) == [Contender(name, size, RATE * factor) for size, factor in wanted]


def test_the_best_rate_is_run_at_every_size_once() -> None:
    known = [*planned([96, 160]), Contender("adamw", 96, RATE * 4)]
    curves = {Contender("adamw", 96, RATE * f): curve(loss) for f, loss in zip((0.5, 1.0, 2.0, 4.0), (5, 4.5, 4, 4.2))}
    best = Contender("adamw", 160, RATE * 2)
    assert called_for(curves, known, [96, 160]) == [best]
    assert called_for(curves, [*known, best], [96, 160]) == []


def test_best_rates_have_the_lowest_final_loss() -> None:
    curves = {
        Contender("muon", 96, RATE): curve(5.0, 4.0),
        Contender("muon", 96, RATE * 2): curve(5.5, 3.8),
        Contender("adamw", 96, RATE): curve(5.0, 4.1),
        Contender("adamw", 96, RATE * 4): curve(5.5, 3.9),
    }
    best = {name: best_rate(curves, name, 96) for name in ("muon", "adamw")}
    assert best == {"muon": RATE * 2, "adamw": RATE * 4}
    same, adamw_best, both_best = results(curves, [96], RATE)
    assert (same["ours"], same["peer"], same["met"]) == (4.0, 4.1, True)
    assert (adamw_best["ours"], adamw_best["peer"], adamw_best["ratio"], adamw_best["met"]) == (4.0, 3.9, 1.0256, False)
    assert (both_best["ours"], both_best["peer"], both_best["met"]) == (3.8, 3.9, True)


def test_where_a_curve_passes_a_loss() -> None:
    falling = curve(6.0, 5.0, 4.0)
    assert [passes(falling, loss) for loss in (6.5, 5.5, 5.0, 4.25, 3.9)] == ["before 10", "15", "20", "28", "never"]


def test_runs_that_start_from_different_weights_are_not_compared() -> None:
    muon, adamw = Contender("muon", 96, RATE), Contender("adamw", 96, RATE)
    check_pairs({muon: curve(4.0), adamw: curve(4.1)})
    with pytest.raises(AssertionError, match="start from different weights"):
        check_pairs({muon: curve(4.0), adamw: curve(4.1, first_loss=8.31)})
