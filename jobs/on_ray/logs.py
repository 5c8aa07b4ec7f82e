"""Copy a cluster's session logs to storage. A file is copied whole when its size or time changed; of a larger one the last `MAX_BYTES`."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import locate, parser, refusing
from pipeline.storage import Storage

MAX_BYTES = 64 * 1024 * 1024


@refusing
def command(arguments: Sequence[str] | None) -> int:
    """`jobs.logs`, until SIGTERM. Returns the exit code."""
    made = parser("logs", "Keep a cluster's logs in the run's folder.")
    made.add_argument("--name", required=True, help="the RayJob's name")
    made.add_argument("--place", default="", help="folder below the RayJob's: which try, which pod")
    made.add_argument("--source", type=Path, default=Path("/tmp/ray/session_latest/logs"))
    made.add_argument("--every", type=float, default=60.0, help="seconds")
    given = made.parse_args(arguments)
    config, storage = locate(given.config, given.overrides)
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.set())
    folder = f"runs/{config.run_id}/logs/{given.name}/{given.place}".rstrip("/")
    keep_copying(given.source, storage, folder, given.every, stopped)
    return 0


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


def keep_copying(source: Path, storage: Storage, folder: str, every: float, stopped: threading.Event) -> None:
    """Copy every `every` seconds, and once more when `stopped` is set. Trouble is reported and tried again in the next round."""
    seen: dict[str, tuple[int, int]] = {}
    last = False
    while not last:
        last = stopped.wait(every)
        try:
            copied = copy_changed(source, storage, folder, seen)
            print(f"{len(copied)} logs to {storage.uri(folder)}", flush=True)
        except Exception as error:  # whatever a storage client raises
            print(f"logs not copied ({type(error).__name__}: {error})", file=sys.stderr, flush=True)
