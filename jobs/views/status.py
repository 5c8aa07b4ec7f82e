"""Where a run stands, on the screen."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from jobs import stages
from jobs.cli import open_run, parser, refusing
from jobs.stages.records import Records
from jobs.views.summary import task_lines
from pipeline.config.schema import RunConfig
from pipeline.report.curves import page_path, read_all
from pipeline.storage import Storage
from pipeline.training.goodput import read_goodput
from pipeline.workflow.duration import duration
from pipeline.workflow.record import read_events, read_progress, stage_seconds

STALE_S = 120.0
PATIENCE_S = 20.0  # for a cluster's API: somebody is looking at the screen


@refusing
def command(arguments: Sequence[str] | None) -> int:
    """`jobs.status`. Returns the exit code."""
    made = parser("status", "Show where a run stands.")
    made.add_argument("--kubernetes", action="store_true", help="also list the run's RayJobs in the current cluster")
    given = made.parse_args(arguments)
    config, storage = open_run(given.config, given.overrides)
    require_run(config, storage)
    records = stages.find(config, storage)
    return show(config, storage, records, kubernetes=given.kubernetes)


def require_run(config: RunConfig, storage: Storage) -> None:
    """Raises ValueError if there is nothing of a run of this name."""
    if not storage.list(f"runs/{config.run_id}"):
        others = sorted({entry.path.split("/")[1] for entry in storage.list("runs")})
        raise ValueError(
            f"run_id {config.run_id}: there is no such run in {storage.uri()}; there are: {', '.join(others) or 'none'}"
        )


def show(config: RunConfig, storage: Storage, records: Records, *, kubernetes: bool) -> int:
    """Print it; with `kubernetes` ask the cluster, too. Returns the exit code."""
    print(f"run {config.run_id} in {storage.uri()}")
    events = read_events(storage, config.run_id)
    seconds = stage_seconds(events)
    for stage in stages.names():
        took = f"  {duration(seconds[stage])}" if stage in seconds else ""
        print(f"  {stage:<9} {'done' if records.done(stage) else 'not done'}{took}")
    if records.evaluation is not None:
        overall = records.evaluation.overall
        print(f"  held out  loss {overall.loss:.3f} nats per token, {overall.bits_per_byte:.3f} bits per byte")
        for line in task_lines(records.evaluation, "  tasks     "):
            print(line)
    for line in _judged(config, storage):
        print(line)
    goodput = read_goodput(storage, config.run_id)
    if goodput is not None:
        print(f"  goodput   {goodput.line()}")
    progress = read_progress(storage, config.run_id)
    if progress and not records.done(progress.stage):
        age = time.time() - progress.updated
        stale = f"  (no news for {duration(age)})" if age > STALE_S and progress.unit else ""  # waiting makes no news
        print(f"now: {progress.line()}{stale}")
    return _show_now(config.run_id) if kubernetes else _show_last_seen(events)


def _judged(config: RunConfig, storage: Storage) -> Iterator[str]:
    """Where the evaluation of the run's checkpoints stands, if there is more than one."""
    try:
        found = read_all(storage, config.run_id)
    except ValueError as error:
        yield f"  judged    {error}"
        return
    if len(found) > 1:
        newest = found[-1]
        where = storage.uri(page_path(config.run_id))
        yield f"  judged    {len(found)} checkpoints, the newest of step {newest.step:,}: loss {newest.overall.loss:.3f}  {where}"


def _show_last_seen(events: list[dict[str, Any]]) -> int:
    """The newest event of each RayJob."""
    last = {event["name"]: event for event in events if event["event"] == "rayjob"}
    for event in last.values():
        at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(event["time"]))
        where = f"  dashboard {event['dashboard']}" if event.get("dashboard") else ""
        print(f"  RayJob {event['name']}: {event['phase']} at {at}  {event['detail']}{where}".rstrip())
    return 0


def _show_now(run_id: str) -> int:
    from pipeline.workflow.rayjobs import ApiUnavailable, NotServed, Refused, connect, stages_of

    try:
        jobs = stages_of(connect(os.environ, PATIENCE_S), run_id)
    except (ApiUnavailable, NotServed, Refused, ValueError) as error:
        print(f"error: --kubernetes: {error}", file=sys.stderr)
        return 1
    for job in jobs:
        where = f"  dashboard {job.dashboard_url}" if job.dashboard_url else ""
        print(f"  RayJob {job.name}: {job.phase}  {job.reason} {job.message}{where}".rstrip())
    if not jobs:
        print("  no RayJobs of this run in the cluster")
    return 0
