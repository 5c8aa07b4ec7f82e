"""Keep a cluster's logs: copy Ray's session logs into the run's folder while the cluster lives, and once more when it goes.

`python -m jobs.logs --name <RayJob> --config <preset or path> [section.key=value ...]` runs beside the head of a stage (container `logs` in
k8s/stages) and writes `<root>/runs/<run_id>/logs/<RayJob>/<file>`. A file is copied whole when its size or time changed, at most every
`--every` seconds; the last `MAX_BYTES` of a larger one. Trouble with the storage is reported and tried again: logs must never take
a stage down, so this ends only on SIGTERM.
"""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

from jobs.cli import parser
from pipeline.config.load import ConfigError, load_config
from pipeline.storage import Storage, open_storage

MAX_BYTES = 64 * 1024 * 1024


def copy_changed(source: Path, storage: Storage, folder: str, seen: dict[str, tuple[int, int]]) -> list[str]:
    """Copy what changed since `seen` (size and time by name, updated here); returns the names copied."""
    copied = []
    for path in sorted(source.rglob("*")):
        if not path.is_file():
            continue
        name, facts = str(path.relative_to(source)), path.stat()
        if seen.get(name) == (facts.st_size, facts.st_mtime_ns):
            continue
        with path.open("rb") as file:
            file.seek(max(0, facts.st_size - MAX_BYTES))
            storage.write(f"{folder}/{name}", file.read(MAX_BYTES))
        seen[name] = facts.st_size, facts.st_mtime_ns
        copied.append(name)
    return copied


def main(arguments: list[str], stopped: threading.Event | None = None) -> int:
    made = parser("logs", "Keep a cluster's logs in the run's folder.")
    made.add_argument("--name", required=True, help="the RayJob's name")
    made.add_argument("--source", type=Path, default=Path("/tmp/ray/session_latest/logs"))
    made.add_argument("--every", type=float, default=60.0, help="seconds")
    given = made.parse_args(arguments)
    try:
        config = load_config(given.config, given.overrides)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if stopped is None:
        stopped = threading.Event()
        signal.signal(signal.SIGTERM, lambda number, frame: stopped.set())
    storage, folder = open_storage(config.storage), f"runs/{config.run_id}/logs/{given.name}"
    seen: dict[str, tuple[int, int]] = {}
    while True:
        last = stopped.wait(given.every)
        try:
            copied = copy_changed(given.source, storage, folder, seen)
            print(f"{len(copied)} logs to {storage.uri(folder)}", flush=True)
        except Exception as error:  # whatever a storage client raises: the next round tries again
            print(f"logs not copied ({type(error).__name__}: {error})", file=sys.stderr, flush=True)
        if last:
            return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
