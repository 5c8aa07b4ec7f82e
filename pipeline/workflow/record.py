"""What a run writes about itself for people: `progress.json` (now) and `events.jsonl` (what happened when).

    <root>/runs/<run_id>/progress.json   the stage at work: done, total, rate, ETA; replaced at most once a second. On Kubernetes,
                                         until the stage's program begins: what its RayJob waits for
    <root>/runs/<run_id>/events.jsonl    a line a stage started, finished or failed, with UNIX times and seconds; on Kubernetes
                                         also one a state of a RayJob, with the reason and the address of its dashboard

Neither is hashed nor read by a stage: they describe the making, not the thing. A lost update costs a line on a screen,
so failures to write them are reported on stderr and the work goes on.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from botocore.exceptions import BotoCoreError

from pipeline.config.schema import StorageConfig
from pipeline.storage import Storage, open_storage
from pipeline.workflow.duration import duration


@dataclass(frozen=True)
class StageProgress:
    """How far a stage is. `done` and `total` are in `unit`; `rate` is in `rate_unit` per second. Without a unit: not at work, for the reason in `note`."""

    stage: str
    done: int
    total: int
    unit: str
    rate: float
    rate_unit: str
    eta_s: float | None
    note: str = ""
    updated: float = 0.0  # UNIX time

    def line(self) -> str:
        if not self.unit:
            return f"{self.stage:<9}  {self.note}"
        share = f" {self.done / self.total:4.0%}" if self.total else ""
        eta = "" if self.eta_s is None else f"  {duration(self.eta_s)} left"
        rate = f"  {self.rate:,.0f} {self.rate_unit}/s" if self.rate else ""
        note = f"  {self.note}" if self.note else ""
        return f"{self.stage:<9}{share}  {self.done:,}/{self.total:,} {self.unit}{note}{rate}{eta}"


def progress_path(run_id: str) -> str:
    return f"runs/{run_id}/progress.json"


def events_path(run_id: str) -> str:
    return f"runs/{run_id}/events.jsonl"


@dataclass
class ProgressFile:
    """Prints progress and keeps `progress.json`; picklable, so it goes to the process where the work is done."""

    storage: StorageConfig
    run_id: str
    every_s: float = 1.0
    _written: float = field(default=0.0, repr=False)

    def __call__(self, progress: StageProgress) -> None:
        now = time.time()
        finished = progress.done >= progress.total
        if not finished and now - self._written < self.every_s:
            return
        self._written = now
        print(progress.line(), flush=True)
        record = {**asdict(progress), "updated": now}
        _keep(lambda: open_storage(self.storage).write(progress_path(self.run_id), json.dumps(record).encode()))


def read_progress(storage: Storage, run_id: str) -> StageProgress | None:
    """None without one. Raises ValueError for one that is torn, or of another version of the code."""
    path = progress_path(run_id)
    data = storage.read_or_none(path)
    try:
        return None if data is None else StageProgress(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{storage.uri(path)}: no record of progress ({error}); the stage at work writes it anew"
        ) from None


def note_waiting(storage: Storage, run_id: str, stage: str, note: str, *, begun: float | None = None) -> None:
    """Put a stage that is not at work into `progress.json`, with the reason. begun: unless it has written there itself since that UNIX time."""
    record = asdict(StageProgress(stage, 0, 0, "", 0.0, "", None, note, time.time()))

    def write() -> None:
        if begun is not None:
            now = read_progress(storage, run_id)
            if now and now.stage == stage and now.unit and now.updated >= begun:
                return
        storage.write(progress_path(run_id), json.dumps(record).encode())

    _keep(write)


def add_event(storage: Storage, run_id: str, event: str, stage: str, **facts: Any) -> None:
    """Append one line; concurrent writers do not lose each other's."""
    line = json.dumps({"time": round(time.time(), 3), "event": event, "stage": stage, **facts}, sort_keys=True)
    path = events_path(run_id)

    def append() -> None:
        for attempt in range(20):
            etag = storage.etag(path)
            before = (storage.read_or_none(path) or b"") if etag else b""
            if storage.swap(path, before + line.encode() + b"\n", etag):
                return
            time.sleep(random.uniform(0, 0.01 * 2 ** min(attempt, 7)))  # so that somebody gets through
        raise OSError("lost twenty races in a row")

    _keep(append)


def read_events(storage: Storage, run_id: str) -> list[dict[str, Any]]:
    """In order. A line that is torn is named on stderr and left out: what happened is told, not decided by them."""
    path, found = events_path(run_id), []
    for number, line in enumerate((storage.read_or_none(path) or b"").splitlines(), start=1):
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or not {"time", "event", "stage"} <= event.keys():
                raise ValueError("no event with a time and a stage")
            found.append(event)
        except ValueError as error:
            print(f"{storage.uri(path)}: line {number} is left out: {error}", file=sys.stderr, flush=True)
    return found


def stage_seconds(events: list[dict[str, Any]]) -> dict[str, float]:
    """Wall seconds of each stage, failed attempts included, since the stage last had to be done; in the order of their first events."""
    seconds: dict[str, float] = {}
    finished: set[str] = set()
    for event in events:
        stage = event["stage"]
        if event["event"] == "started" and stage in finished:
            finished.discard(stage)
            seconds.pop(stage, None)
        if "seconds" in event:
            seconds[stage] = seconds.get(stage, 0.0) + event["seconds"]
        if event["event"] == "finished":
            finished.add(stage)
    return {stage: seconds[stage] for stage in dict.fromkeys(event["stage"] for event in events) if stage in seconds}


def _keep(write: Callable[[], None]) -> None:
    try:
        write()
    except (OSError, BotoCoreError) as error:  # S3 answered with an error, or not at all
        print(f"progress not recorded ({type(error).__name__}: {error})", file=sys.stderr, flush=True)
