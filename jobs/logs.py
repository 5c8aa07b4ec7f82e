"""Keep a cluster's logs: copy Ray's session logs into the run's folder while the cluster lives, and once more when it goes.

`python -m jobs.logs --name <RayJob> --config <preset or path> [section.key=value ...]` runs beside the head of a stage (container `logs` in
k8s/stages) and writes `<root>/runs/<run_id>/logs/<RayJob>/<cluster>/<pod>/<file>`: a retry is another cluster, a head that came back another pod.
Logs must never take a stage down, so this ends only on SIGTERM.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import locate, parser
from jobs.on_ray.logs import keep_copying


def main(arguments: Sequence[str] | None = None, stopped: threading.Event | None = None) -> int:
    made = parser("logs", "Keep a cluster's logs in the run's folder.")
    made.add_argument("--name", required=True, help="the RayJob's name")
    made.add_argument("--place", default="", help="folder below the RayJob's: which try, which pod")
    made.add_argument("--source", type=Path, default=Path("/tmp/ray/session_latest/logs"))
    made.add_argument("--every", type=float, default=60.0, help="seconds")
    given = made.parse_args(arguments)
    try:
        config, storage = locate(given.config, given.overrides)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if stopped is None:
        stopped = threading.Event()
        signal.signal(signal.SIGTERM, lambda number, frame: stopped.set())
    folder = f"runs/{config.run_id}/logs/{given.name}/{given.place}".rstrip("/")
    keep_copying(given.source, storage, folder, given.every, stopped)
    return 0


if __name__ == "__main__":
    sys.exit(main())
