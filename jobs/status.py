"""Where a run stands, wherever it runs: its stages, the progress of the one at work, its RayJobs on Kubernetes.

    python -m jobs.status --config <preset or path> [section.key=value ...]

Reads storage, starts nothing, changes nothing. A run on Kubernetes shows its RayJobs as the driver last saw them, from anywhere;
--kubernetes asks the cluster itself, which also knows when the driver is gone.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from jobs import stages
from jobs.cli import open_run, parser
from jobs.summary import task_lines
from pipeline.workflow.record import STAGES, duration, read_events, read_progress, stage_seconds

STALE_S = 120.0
PATIENCE_S = 20.0  # for a cluster's API: somebody is looking at the screen


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser("status", "Show where a run stands.")
    made.add_argument("--kubernetes", action="store_true", help="also list the run's RayJobs in the current cluster")
    given = made.parse_args(arguments)
    try:
        config, storage = open_run(given.config, given.overrides)
        records = stages.find(config, storage)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"run {config.run_id} in {storage.uri()}")
    events = read_events(storage, config.run_id)
    seconds = stage_seconds(events)
    for stage in STAGES:
        took = f"  {duration(seconds[stage])}" if stage in seconds else ""
        print(f"  {stage:<9} {'done' if records.done(stage) else 'not done'}{took}")
    if records.evaluation is not None:
        overall = records.evaluation.overall
        print(f"  held out  loss {overall.loss:.3f} nats per token, {overall.bits_per_byte:.3f} bits per byte")
        for line in task_lines(records.evaluation, "  tasks     "):
            print(line)
    progress = read_progress(storage, config.run_id)
    if progress and not records.done(progress.stage):
        age = time.time() - progress.updated
        stale = f"  (no news for {duration(age)})" if age > STALE_S and progress.unit else ""  # waiting makes no news
        print(f"now: {progress.line()}{stale}")
    return _show_now(config.run_id) if given.kubernetes else _show_last_seen(events)


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


if __name__ == "__main__":
    sys.exit(main())
