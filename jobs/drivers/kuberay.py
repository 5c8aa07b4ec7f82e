"""`jobs.pipeline --backend kuberay`: every stage as a RayJob in the cluster this process can reach.

The work is `pipeline.workflow.rayjobs.run_stage`: idempotent, re-attachable, with an exit code for each class of failure. This
is the adapter: which stages, what their arguments are, when they are done, and what is shown meanwhile: every state of the RayJobs, and
while a stage's program runs its own progress from storage.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from functools import partial

from botocore.exceptions import BotoCoreError

from jobs import stages
from jobs.on_ray.progress import ProgressLines, Work
from jobs.stages.records import Records, hold_dataset
from jobs.views.summary import print_summary
from pipeline.config.load import ConfigError, load_config
from pipeline.config.schema import RunConfig
from pipeline.storage import Storage
from pipeline.training.commits import committed
from pipeline.workflow.rayjobs import (
    WORTH_ANOTHER_ATTEMPT,
    Options,
    Outcome,
    RayJobApi,
    StageFailed,
    StageStatus,
    connect,
    options_from,
    overrides_of,
    run_stage,
)
from pipeline.workflow.rayjobs_template import OVERRIDES_ANNOTATION, template_name
from pipeline.workflow.record import add_event, note_waiting

FIRST_S = 10.0  # between two looks for the first checkpoint
FOLLOW = "follow"  # what `--only` calls the evaluate stage beside training


def run_on_kuberay(config: RunConfig, storage: Storage, given: argparse.Namespace, records: Records) -> int:
    """Run the wanted stages; returns the exit code (`rayjobs.Outcome`). `records`: of what is done. Raises ConfigError."""
    try:
        return _run(config, storage, given, records)
    except StageFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.outcome)
    except (OSError, BotoCoreError) as error:  # storage answered when we began; RayJobs that were made go on
        print(f"error: storage.root {storage.uri()}: {type(error).__name__}: {error}", file=sys.stderr)
        return int(Outcome.USAGE if isinstance(error, PermissionError) else Outcome.INFRASTRUCTURE)


def tell(storage: Storage, run_id: str, status: StageStatus) -> str:
    """A line here and an event; the line."""
    detail = f"{status.reason} {status.message}".strip()
    where = f"  dashboard {status.dashboard_url}" if status.dashboard_url else ""
    line = f"{status.name}: {status.phase}  {detail}{where}".rstrip()
    print(f"{status.stage:<9} {line}", flush=True)
    add_event(
        storage,
        run_id,
        "rayjob",
        status.stage,
        name=status.name,
        phase=status.phase,
        detail=detail,
        dashboard=status.dashboard_url,
    )
    return line


def show(storage: Storage, run_id: str, status: StageStatus) -> None:
    """One state of a RayJob for people: a line here, an event, and `progress.json` unless the stage itself writes there."""
    line = tell(storage, run_id, status)
    if status.phase in ("queued", "starting", "retrying", "running"):
        note_waiting(storage, run_id, status.stage, line, begun=status.began if status.phase == "running" else None)


def _run(config: RunConfig, storage: Storage, given: argparse.Namespace, records: Records) -> int:
    api, options = connect(os.environ), options_from(os.environ)
    arguments = ["--config", given.config, *given.overrides]

    _refuse_overrides(given, records, api)
    followed: set[str] = set()  # stages whose RayJob this driver has seen at work

    def done(stage: str) -> bool:
        if stage in followed:
            return stages.finished(stage, config, storage)
        return stages.find(config, storage, stage).done(stage)

    with ProgressLines(storage, config.run_id) as lines:

        def report(status: StageStatus) -> None:
            followed.add(status.stage)
            lines.work = Work(status.stage, since=status.began) if status.at_work else None
            show(storage, config.run_id, status)

        if given.only == FOLLOW:
            _follow(config, storage, arguments, api, options)
            return 0
        beside: threading.Thread | None = None
        for stage in [given.only] if given.only else stages.names():
            if stage == "train" and not given.only and config.evaluation.follow and not done("evaluate"):
                settings = (config, storage, arguments, api, options)
                beside = threading.Thread(target=_follow_quietly, args=settings, name=FOLLOW, daemon=True)
                beside.start()
            if stage == "evaluate" and beside is not None:
                beside.join()  # it has judged everything, or the stage does what is left
            if stage != "prepare":  # whose corpus was looked at a moment ago
                stages.check([stage], config, storage, stages.find(config, storage, stage), here=False)
            status = run_stage(
                config,
                stage,
                _asked(config, stage, arguments),
                api=api,
                done=partial(done, stage),
                report=report,
                options=options,
            )
            lines.work = None
            if status is None:
                stages.confirm(stage, storage, stages.find(config, storage, stage))
            print(f"{stage:<9} {'up to date' if status is None else 'done'}", flush=True)
            if stage == "prepare" and status is None:  # one that was at work has done so itself
                hold_dataset(config, storage, stages.find(config, storage).dataset)
    if not given.only:
        print_summary(config, storage, stages.find(config, storage), given)
    return 0


def _refuse_overrides(given: argparse.Namespace, records: Records, api: RayJobApi) -> None:
    """What a template adds for its hardware must fit the run: found here, and not by the stage's program weeks later. Raises ConfigError."""
    only = "evaluate" if given.only == FOLLOW else given.only
    for stage in [only] if only else stages.names():
        if records.done(stage):
            continue
        added = overrides_of(api, stage)
        try:
            load_config(given.config, [*given.overrides, *added])
        except ConfigError as error:
            raise ConfigError(
                f"{template_name(stage)} adds {' '.join(added)} for its hardware, and with that {error}; change the run's setting, or have "
                f"the template's annotation {OVERRIDES_ANNOTATION} changed"
            ) from None


def _asked(config: RunConfig, stage: str, arguments: list[str]) -> list[str]:
    """What the stage's program is told."""
    return [*arguments, "--follow"] if stage == "evaluate" and config.evaluation.follow else arguments


def _follow(config: RunConfig, storage: Storage, arguments: list[str], api: RayJobApi, options: Options) -> None:
    """The evaluate stage's RayJob while training is at work, brought to its end; nothing without `evaluation.follow`.

    One that dies is made again, and so is one whose deadline has passed: training may take longer.
    """
    if not config.evaluation.follow:
        print(f"{FOLLOW:<9} evaluation.follow is off", flush=True)
        return

    def say(status: StageStatus) -> None:  # but not in progress.json, which is training's
        tell(storage, config.run_id, status)

    while not committed(storage, config.run_id):  # until there is something to judge nothing is held for it
        time.sleep(FIRST_S)
    failures = 0
    while True:
        try:
            run_stage(
                config,
                "evaluate",
                _asked(config, "evaluate", arguments),
                api=api,
                done=lambda: stages.find(config, storage, "evaluate").done("evaluate"),
                report=say,
                options=options,
            )
        except StageFailed as error:
            failures += error.outcome != Outcome.DEADLINE
            again = error.outcome in WORTH_ANOTHER_ATTEMPT or error.outcome == Outcome.DEADLINE
            if not again or -1 < config.cluster.max_failures < failures:
                raise
            print(f"{FOLLOW:<9} {error}; it is made again", file=sys.stderr, flush=True)
        else:
            print(f"{FOLLOW:<9} every checkpoint is judged", flush=True)
            return


def _follow_quietly(
    config: RunConfig, storage: Storage, arguments: list[str], api: RayJobApi, options: Options
) -> None:
    """Training goes on whatever becomes of it; the evaluate stage does what is left."""
    try:
        _follow(config, storage, arguments, api, options)
    except (StageFailed, ValueError, OSError, BotoCoreError) as error:
        print(f"{FOLLOW:<9} {error}; the evaluate stage does what is left", file=sys.stderr, flush=True)
