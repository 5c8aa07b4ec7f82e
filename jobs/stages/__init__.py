"""The stages of a run, in order, as every front door goes by them: what is already done, and how to do the rest.

Each is a module of this package that answers the same four questions (`stage.Stage`). So a finished stage costs a read, and
after any crash the same command goes on where the records end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jobs.stages import evaluate, prepare, publish, train
from jobs.stages.records import Records, hold_dataset
from jobs.stages.stage import Stage
from pipeline.config.schema import RunConfig
from pipeline.publishing import registry
from pipeline.storage import Storage
from pipeline.workflow.record import ProgressFile, StageProgress, add_event

STAGES: tuple[Stage, ...] = (prepare, train, evaluate, publish)


class MissingInput(ValueError):
    """A stage before this one has not been done; the message has the command that does it."""


def names() -> list[str]:
    return [stage.NAME for stage in STAGES]


def room(name: str) -> Stage:
    return next(stage for stage in STAGES if name == stage.NAME)


def find(
    config: RunConfig,
    storage: Storage,
    stage: str = "prepare",
    before: Records | None = None,
    *,
    until: str = publish.NAME,
) -> Records:
    """Read the records of the run, stage by stage, as `stage` sees them (see `records.held_dataset`). Raises ConfigError.

    `before`: what this command has found already; its list of the corpus counts for all of the command. `until`: the last stage that is
    asked; a stage's own program asks no later ones, whose folders its role may not read (infra/modules/plan/storage.tf).
    """
    records = Records(seen_by=stage, listings=before.listings if before else {})
    for each in STAGES:
        record = each.find(config, storage, records)
        if record is None:
            break
        records.of[each.NAME] = record
        if until == each.NAME:
            break
    return records


def finished(stage: str, config: RunConfig, storage: Storage) -> bool:
    """Has the stage that just ended left its record? What came into the corpus while prepare was at work does not count."""
    return find(config, storage, "train" if stage == "prepare" else stage).done(stage)


def check(wanted: Sequence[str], config: RunConfig, storage: Storage, records: Records, *, here: bool = True) -> None:
    """What can be wrong before those of the wanted stages that are not done: ask before any hardware is asked for.

    Raises MissingInput, and ConfigError (`stage.Stage.check`, also for `here`).
    """
    todo = [stage for stage in wanted if not records.done(stage)]
    if todo:
        require_inputs(todo[0], records)
    for stage in todo:
        room(stage).check(config, storage, records, here=here)


def require_inputs(stage: str, records: Records) -> None:
    """Raises MissingInput for the first stage before this one that is not done."""
    for earlier in names()[: names().index(stage)]:
        if not records.done(earlier):
            raise MissingInput(
                f"{stage} needs the result of {earlier}, which is not there; run python -m jobs.{earlier}"
            )


def confirm(stage: str, storage: Storage, records: Records) -> None:
    """Before a stage is called up to date: published files are read once more. Raises ValueError that names damaged ones."""
    if stage == publish.NAME and records.model is not None:
        registry.check(storage, records.model)


def run(stage: str, config: RunConfig, storage: Storage, before: Records | None = None) -> None:
    """Do one stage on the connected Ray cluster; nothing if it is done. Raises MissingInput and what the stage raises."""
    records = find(config, storage, stage, before, until=stage)
    hold_dataset(config, storage, records.dataset)
    if records.done(stage):
        confirm(stage, storage, records)
        print(f"{stage}: up to date", flush=True)
        return
    require_inputs(stage, records)
    add_event(storage, config.run_id, "started", stage)
    start = time.monotonic()
    try:
        room(stage).do(config, storage, records, reporter(stage, config))
    except BaseException as error:
        seconds = round(time.monotonic() - start, 3)
        add_event(
            storage, config.run_id, "failed", stage, seconds=seconds, error=f"{type(error).__name__}: {error}"[:500]
        )
        raise
    add_event(storage, config.run_id, "finished", stage, seconds=round(time.monotonic() - start, 3))


def reporter(stage: str, config: RunConfig) -> Callable[[Any], None]:
    """What goes to where a stage's work is done, to show how far it is."""
    return partial(_report, ProgressFile(config.storage, config.run_id), room(stage).progress())


def _report(show: ProgressFile, read: Callable[[Any], StageProgress], at: Any) -> None:
    show(read(at))
