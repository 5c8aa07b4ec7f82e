"""Every checkpoint of a run judged once, in order, while training goes on or afterwards. No torch in here.

What is judged is what has a record (result.py), so a follower that was killed goes on where it was. Each turn it lists the
run's folders and results by name, pins the checkpoints that still wait (at most `evaluation.waiting` of them, the oldest
first), and judges the oldest. The pins outlast it by an hour, so nothing is deleted under a follower that is started again; that one
pins what waits, and then drops the pins of those before it.

What training does with checkpoints that wait is its own business (training/retention.py): with `evaluation.follow` it keeps the
newest `evaluation.waiting` of those without a result, and says which it retires without one. A result of a follower holds
nothing: the mark `step-00000400.followed` beside it says that `checkpoint.keep` decides as if it had not been judged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pipeline.config.schema import RunConfig
from pipeline.dataset.order import Order
from pipeline.evaluation.result import committed, tasks_are_due
from pipeline.integrity import read_record
from pipeline.manifest import CheckpointManifest, DatasetManifest, EvaluationManifest, TrainManifest
from pipeline.optim.schedule import total_steps
from pipeline.storage import Storage
from pipeline.training.branch import first_step
from pipeline.training.commits import (
    DamagedCheckpoint,
    RunFacts,
    read_manifest,
    refuse_foreign,
    step_folders,
    train_folder,
)
from pipeline.training.left_out import left_out_path
from pipeline.training.retention import (
    Retention,
    evaluated_steps,
    follower_pins,
    mark_followed,
    named_steps,
    reading,
)

Judge = Callable[[CheckpointManifest, bool], EvaluationManifest]  # the checkpoint, and whether tasks are due


@dataclass
class Followed:
    """What a follower did."""

    judged: list[EvaluationManifest] = field(default_factory=list)  # by this one, in order
    passed_over: dict[int, str] = field(default_factory=dict)  # damaged ones, and why
    missing: list[int] = field(default_factory=list)  # steps of the schedule that have no result at the end


def follow(
    config: RunConfig,
    dataset: DatasetManifest,
    storage: Storage,
    *,
    judge: Judge,
    wait: Callable[[], bool],
    say: Callable[[str], None],
) -> Followed:
    """Judge what there is, in order. `wait` is called when there is nothing to do and says whether to look again; once the run is
    complete and judged this returns without asking.

    Raises ValueError for a checkpoint of another dataset or other settings, and what `judge` raises but for damage.
    """
    order = Order.of_run(config, dataset)
    facts = RunFacts.of(config, dataset, order)
    done = Followed()
    known: set[int] = set()  # that have a result of today's settings
    detours: bytes | None = None  # a run that goes back takes checkpoints of the same steps again
    with _Pins(storage, config.run_id) as pins:
        while True:
            complete = _complete(config, storage)
            now = storage.read_or_none(left_out_path(config.run_id))
            if now != detours:
                detours = now
                known.clear()
            waiting = _waiting(config, dataset, storage, known, done)
            pins.hold(waiting[: config.evaluation.waiting])
            checkpoint = _first(config, storage, waiting, done)
            if checkpoint is None:
                if complete is not None or not wait():
                    break
                continue
            refuse_foreign(storage, facts, order, checkpoint)
            with_tasks = tasks_are_due(config, checkpoint.step)
            mark_followed(storage, config.run_id, checkpoint.step)
            try:
                found = judge(checkpoint, with_tasks)
            except DamagedCheckpoint as error:
                _pass_over(done, checkpoint.step, str(error), say)
                continue
            known.add(checkpoint.step)
            done.judged.append(found)
            say(_line(found, len(waiting) - 1))
    if complete is not None:
        Retention(storage, config.run_id, config.checkpoint, named_steps(config)).collect(complete.checkpoint.step)
    expected = {step for step in _expected(config, complete) if step > first_step(config, storage)}
    done.missing = sorted(expected - evaluated_steps(storage, config.run_id))
    return done


class _Pins(contextlib.ExitStack):
    """Pins of several checkpoints, instead of those that an earlier follower held when it was killed."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        super().__init__()
        self._storage, self._run_id = storage, run_id
        self._held: dict[int, contextlib.ExitStack] = {}
        self._earlier = follower_pins(storage, run_id)

    def hold(self, steps: list[int]) -> None:
        """These and no others."""
        for step in set(steps) - self._held.keys():
            self._held[step] = self.enter_context(contextlib.ExitStack())
            self._held[step].enter_context(reading(self._storage, self._run_id, step, follower=True))
        while self._earlier:
            self._storage.delete(self._earlier.pop())
        for step in self._held.keys() - set(steps):
            self._held.pop(step).close()


def _complete(config: RunConfig, storage: Storage) -> TrainManifest | None:
    """The run's manifest, if it has reached the end of today's schedule."""
    found = read_record(storage, f"{train_folder(config.run_id)}/manifest.json", TrainManifest)
    steps = total_steps(config.schedule, config.training.sequence_length)
    return found if found is not None and found.steps >= steps else None


def _waiting(
    config: RunConfig, dataset: DatasetManifest, storage: Storage, known: set[int], done: Followed
) -> list[int]:
    """Steps with a folder and no result of today's settings, oldest first. A result is read once in a follower's life."""
    recorded = evaluated_steps(storage, config.run_id)
    found = []
    for step in step_folders(storage, config.run_id):
        if step in known or step in done.passed_over:
            continue
        if step in recorded:
            checkpoint = read_manifest(storage, config.run_id, step)
            due = tasks_are_due(config, step)
            if checkpoint is None or committed(config, dataset, checkpoint, storage, with_tasks=due) is not None:
                known.add(step)
                continue
        found.append(step)
    return found


def _first(config: RunConfig, storage: Storage, waiting: list[int], done: Followed) -> CheckpointManifest | None:
    """The oldest that is committed; others are being written, or went meanwhile."""
    for step in waiting:
        found = read_manifest(storage, config.run_id, step)
        if found is not None:
            return found
    return None


def _pass_over(done: Followed, step: int, why: str, say: Callable[[str], None]) -> None:
    done.passed_over[step] = why
    say(f"step {step:,} is passed over: {why}")


def _expected(config: RunConfig, complete: TrainManifest | None) -> Iterator[int]:
    """Steps at which the schedule takes a checkpoint."""
    if complete is None:
        return
    yield from range(config.checkpoint.every_steps, complete.steps + 1, config.checkpoint.every_steps)
    yield from named_steps(config)
    yield complete.steps


def _line(found: EvaluationManifest, left: int) -> str:
    error = "" if found.overall.stderr is None else f" ± {found.overall.stderr:.4f}"
    tasks = f", {len(found.tasks)} tasks" if found.tasks else ""
    behind = f"  ({left} more wait)" if left else ""
    return f"step {found.step:,}  loss {found.overall.loss:.4f}{error}{tasks}{behind}"
