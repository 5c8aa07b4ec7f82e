"""`jobs.pipeline --backend kuberay`: every stage as a RayJob in the cluster this process can reach.

The work is `pipeline.workflow.rayjobs.run_stage`: idempotent, re-attachable, with an exit code for each class of failure. This
is the adapter: which stages, what their arguments are, when they are done, and what is shown meanwhile: every state of the RayJobs, and
while a stage's program runs its own progress from storage.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial

from botocore.exceptions import BotoCoreError

from jobs import stages
from jobs.on_ray.progress import ProgressLines, Work
from jobs.stages.records import hold_dataset
from jobs.views.summary import print_summary
from pipeline.config.schema import RunConfig
from pipeline.storage import Storage
from pipeline.workflow.rayjobs import Outcome, StageFailed, StageStatus, connect, options_from, run_stage
from pipeline.workflow.record import add_event, note_waiting


def run_on_kuberay(config: RunConfig, storage: Storage, given: argparse.Namespace) -> int:
    """Run the wanted stages; returns the exit code (`rayjobs.Outcome`)."""
    try:
        return _run(config, storage, given)
    except StageFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.outcome)
    except (OSError, BotoCoreError) as error:  # storage answered when we began; RayJobs that were made go on
        print(f"error: storage.root {storage.uri()}: {type(error).__name__}: {error}", file=sys.stderr)
        return int(Outcome.USAGE if isinstance(error, PermissionError) else Outcome.INFRASTRUCTURE)


def show(storage: Storage, run_id: str, status: StageStatus) -> None:
    """One state of a RayJob for people: a line here, an event, and `progress.json` unless the stage itself writes there."""
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
    if status.phase in ("queued", "starting", "retrying", "running"):
        note_waiting(storage, run_id, status.stage, line, begun=status.began if status.phase == "running" else None)


def _run(config: RunConfig, storage: Storage, given: argparse.Namespace) -> int:
    api, options = connect(os.environ), options_from(os.environ)
    arguments = ["--config", given.config, *given.overrides]

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

        for stage in [given.only] if given.only else stages.names():
            if stage != "prepare":  # whose corpus was looked at a moment ago
                stages.check([stage], config, storage, stages.find(config, storage, stage), here=False)
            status = run_stage(
                config, stage, arguments, api=api, done=partial(done, stage), report=report, options=options
            )
            lines.work = None
            if status is None:
                stages.confirm(stage, storage, stages.find(config, storage, stage))
            print(f"{stage:<9} {'up to date' if status is None else 'done'}", flush=True)
            if stage == "prepare" and status is None:  # one that was at work has done so itself
                hold_dataset(config, storage, stages.find(config, storage).dataset)
    if not given.only:
        print_summary(config, storage, stages.find(config, storage), given.config)
    return 0
