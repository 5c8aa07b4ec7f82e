"""Where a run stands, wherever it runs: its stages, the progress of the one at work, its RayJobs on Kubernetes.

    python -m jobs.status --config <preset or path> [section.key=value ...]

Reads storage only (and the cluster's API with --kubernetes), starts nothing, changes nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from jobs import stages
from jobs.cli import open_run, parser
from pipeline.workflow.record import STAGES, duration, read_events, read_progress, stage_seconds

STALE_S = 120.0


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
    seconds = stage_seconds(read_events(storage, config.run_id))
    for stage in STAGES:
        took = f"  {duration(seconds[stage])}" if stage in seconds else ""
        print(f"  {stage:<9} {'done' if records.done(stage) else 'not done'}{took}")
    progress = read_progress(storage, config.run_id)
    if progress and not records.done(progress.stage):
        age = time.time() - progress.updated
        stale = f"  (no news for {duration(age)})" if age > STALE_S else ""
        print(f"now: {progress.line()}{stale}")
    if given.kubernetes:
        from pipeline.workflow.rayjobs import connect, stages_of

        for job in stages_of(connect(os.environ), config.run_id):
            where = f"  dashboard {job.dashboard_url}" if job.dashboard_url else ""
            print(f"  RayJob {job.name}: {job.phase} {job.reason} {job.message}{where}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
