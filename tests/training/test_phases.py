"""Where the time of a step went: who is slow, in what, by how much; phases that add up; nothing that the host waits for."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.schema import StorageConfig
from pipeline.storage import Storage
from pipeline.training import trainer
from pipeline.training.journal import read_journal
from pipeline.training.step import Step
from pipeline.training.times import PHASES, VALUES, StepTimes, TimesOfRanks, slowest
from tests.distributed import run_distributed
from tests.training.make import Watched, tiny

STEPS, SLEEP = 12, 0.2
WARM = 4  # steps at first that pay for what is built then


@dataclass
class Told:
    times: list[StepTimes]  # that were reported, on rank 0
    steps: list[float]  # seconds of each step but the first, by this rank's clock
    slept: list[float]  # seconds in each step


def _slow_on_rank_1(root: str, where: str) -> Told:
    """The rank sleeps in every step, while it waits for data or before its update."""
    ends: list[float] = []
    slept: list[float] = []
    read, update, late = trainer.read_step, Step.update, torch.distributed.get_rank() == 1

    def sleep(here: str) -> None:
        if here == where:
            start = time.perf_counter()
            time.sleep(SLEEP if late else 0.0)
            slept.append(time.perf_counter() - start)

    def slow_read(*args: Any) -> Any:
        sleep("data")
        return read(*args)

    def slow_update(*args: Any, **more: Any) -> Any:
        sleep("optimizer")
        found = update(*args, **more)
        ends.append(time.perf_counter())
        return found

    trainer.read_step, Step.update = slow_read, slow_update  # type: ignore[assignment]
    watched = Watched()
    watched.train(tiny(root, steps=STEPS, parallelism={"shard": 2, "ep": 2}, checkpoint__every_steps=100))
    return Told([progress.times for progress in watched.progress], [b - a for a, b in zip(ends, ends[1:])], slept)


def _told(tmp_path: Path, phase: str) -> tuple[Told, Told, dict[int, StepTimes]]:
    """Of both ranks, and what was reported by step."""
    first, second = run_distributed(_slow_on_rank_1, 2, str(tmp_path), phase)
    by_step = {times.steps[0]: times for times in first.times if times.steps}
    assert sorted(by_step) == list(range(1, STEPS - 1))  # one is known two steps later
    return first, second, by_step


def _named(by_step: dict[int, StepTimes]) -> tuple[int, str]:
    """Rank and phase that most steps name, but for the first ones."""
    late = [times for step, times in by_step.items() if step > WARM]
    ((named, _),) = Counter((times.slowest_rank, times.slowest_phase) for times in late).most_common(1)
    return named


def test_a_rank_that_sleeps_is_named_with_its_phase(tmp_path: Path) -> None:
    _, _, by_step = _told(tmp_path, "data")
    assert _named(by_step) == (1, "data")
    for times in by_step.values():
        parts = [getattr(times, f"seconds_{each}") for each in PHASES]
        assert min(parts) >= 0
        assert sum(parts) == pytest.approx(times.seconds)


@pytest.mark.long  # clocks: not beside other programs
@pytest.mark.parametrize("phase", ["data", "optimizer"])
def test_the_amount_is_what_it_slept(tmp_path: Path, phase: str) -> None:
    first, second, by_step = _told(tmp_path, phase)
    assert _named(by_step) == (1, phase)
    late = {step: times for step, times in by_step.items() if step > WARM}
    shares = [times.slowest_seconds / (second.slept[step - 1] - first.slept[step - 1]) for step, times in late.items()]
    assert statistics.median(shares) == pytest.approx(1, rel=0.1)
    waited = [times.seconds_exchange * 2 / second.slept[step - 1] for step, times in late.items()]
    assert statistics.median(waited) > 0.9  # the other rank's
    by_clock = statistics.mean(sum(each.steps[: STEPS - 3]) for each in (first, second))  # of steps 2 ... 10
    assert sum(times.seconds for step, times in by_step.items() if step > 1) == pytest.approx(by_clock, rel=0.02)


def test_every_steps_times_are_written_once(tmp_path: Path) -> None:
    """Of a run that was stopped and goes on: the lines of two attempts cover all steps, the last ones too, and metrics have no times."""
    watched, storage = Watched(), Storage(StorageConfig(root=str(tmp_path)))
    asked: list[int] = []
    with pytest.raises(trainer.TrainingStopped):
        watched.train(tiny(str(tmp_path), steps=9), should_stop=lambda: asked.append(0) or len(asked) > 4)
    watched.train(tiny(str(tmp_path), steps=9))
    lines = read_journal(storage, "tiny").lines
    assert [line["from_step"] for line in lines if "from_step" in line] == [0, 6]
    timed = [line for line in lines if line.get("first_step")]
    assert [step for line in timed for step in range(line["first_step"], line["last_step"] + 1)] == list(range(1, 10))
    assert all(line["slowest_rank"] == -1 and line["slowest_seconds"] is None for line in timed)  # of one rank
    assert all(
        line["memory_peak_bytes"] > 1e6 and line["flops_per_second"] > 0 and line["mfu"] is None for line in timed
    )
    metrics = b"".join(path.read_bytes() for path in (tmp_path / "runs/tiny/train/metrics").glob("*"))
    assert metrics.count(b"\n") == 9
    assert b"seconds" not in metrics


seconds = st.floats(0, 100, allow_nan=False)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 5).flatmap(
        lambda ranks: st.lists(
            st.lists(seconds, min_size=ranks * VALUES, max_size=ranks * VALUES), min_size=1, max_size=4
        )
    )
)
def test_means_and_sums(sent: list[list[float]]) -> None:
    """Against the same arithmetic in one tensor."""
    ranks = len(sent[0]) // VALUES
    times = TimesOfRanks(ranks)
    for number, values in enumerate(sent):
        times.add((2 * number + 1, 2 * number + 2), values)
    found = times.take()
    table = torch.tensor(sent, dtype=torch.float64).view(len(sent), ranks, VALUES)
    means = table[:, :, :-1].sum(0).mean(0) / (2 * len(sent))
    assert [getattr(found, f"seconds_{phase}") for phase in PHASES] == pytest.approx(means.tolist())
    assert found.seconds == pytest.approx(float(means.sum()))
    assert found.memory_peak_bytes == float(table[:, :, -1].max())
    assert found.steps == tuple(range(1, 2 * len(sent) + 1))
    assert times.take() == StepTimes()  # told once


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(2, 6), st.data())
def test_the_slowest_is_who_has_more_of_one_phase_than_the_others(ranks: int, data: st.DataObject) -> None:
    base = data.draw(st.lists(seconds, min_size=len(PHASES), max_size=len(PHASES)))
    rank, more = data.draw(st.integers(0, ranks - 1)), data.draw(st.floats(0.01, 10))
    phase = data.draw(st.sampled_from([phase for phase in PHASES if phase != "exchange"]))
    by_rank = [list(base) for _ in range(ranks)]
    by_rank[rank][PHASES.index(phase)] += more
    for other in range(ranks):
        by_rank[other][PHASES.index("exchange")] += 0.0 if other == rank else more
    assert slowest(by_rank) == (rank, phase, pytest.approx(more))
