"""What a run looked like while it trained: the figures of a logged step with the clock beside them, for whoever watches.

    <root>/runs/<run_id>/train/journal/000003-1764320000123-0000.jsonl     attempt 3 (the lease's number), when it began, part 0

`metrics/` holds what the run's inputs decide, as its checkpoints know it. A journal also holds times, rates and memory, and is there
before the first checkpoint is; nothing hashes it and no stage reads it. Its first line says where an attempt went on:

    {"attempt": 3, "from_step": 400, "gone_back": 0, "ranks": 8, "time": 1764320000.1}

and every other one is a logged step: the line of `metrics/`, the fields of its `TrainProgress`, those of its times (times.py), of the
steps from "first_step" to "last_step", and "time" (UNIX seconds).

A thread writes, every `WRITE_S` and when a checkpoint is taken: training waits for no storage. Of one that is away is told once, and what was not
written then is written when it is back. An attempt that has lost its lease writes nothing more. `read_journal` puts the attempts in
a row: what a later one did again replaces what an earlier one had done.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from botocore.exceptions import BotoCoreError

from pipeline.lease import LeaseLost
from pipeline.storage import Storage
from pipeline.training.commits import train_folder
from pipeline.training.metrics import StepRecord, TrainProgress

WRITE_S = 3.0
LINES_PER_FILE = 500  # a file is written whole, so a small one
PATIENCE_S = 10.0  # for the last lines of an attempt

Line = dict[str, Any]


def journal_folder(run_id: str) -> str:
    return f"{train_folder(run_id)}/journal"


class Journal:
    """Of one attempt. Lives on rank 0, from its first step until `close`."""

    def __init__(
        self,
        storage: Storage,
        run_id: str,
        attempt: int,
        from_step: int,
        ranks: int,
        check: Callable[[], None] = lambda: None,
        gone_back: int = 0,
    ) -> None:
        """`check`: asked before each write; raises LeaseLost if somebody has taken the run over. `gone_back`: how often the run has gone
        back on a spike (left_out.py)."""
        self._storage = storage
        self._prefix = f"{journal_folder(run_id)}/{attempt:06d}-{time.time_ns() // 1_000_000:013d}"
        self._lines: list[bytes] = []  # from the first one of the last part that is not full
        self._part = 0
        self._written = 0  # of these lines
        self._away = False
        self._check = check
        self._lock = threading.Lock()
        self._ended = False
        self._due = threading.Event()  # to be written now
        self._due.set()  # the begin: an attempt that dies at once leaves a trace
        self._append({"attempt": attempt, "from_step": from_step, "ranks": ranks, "gone_back": gone_back})
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def add(self, record: StepRecord, progress: TrainProgress) -> None:
        """Costs no wait: the thread writes."""
        self._append({**progress.record(), **json.loads(record.line())})

    def close(self) -> None:
        """Write what is left; a storage that is away is not waited for longer than `PATIENCE_S`."""
        self._ended = True
        self._due.set()
        self._thread.join(PATIENCE_S)

    def flush(self) -> None:
        """Write soon what is there: a checkpoint is about to make it last."""
        self._due.set()

    def _append(self, values: Mapping[str, Any]) -> None:
        line = json.dumps(_finite({**values, "time": round(time.time(), 3)}), sort_keys=True).encode() + b"\n"
        with self._lock:
            self._lines.append(line)

    def _run(self) -> None:
        while not self._ended:
            self._due.wait(WRITE_S)
            self._due.clear()
            self._write()
        self._write()

    def _write(self) -> None:
        while True:
            with self._lock:
                lines = self._lines[:LINES_PER_FILE]
            if len(lines) == self._written:
                return
            try:
                self._check()
                self._storage.write(f"{self._prefix}-{self._part:04d}.jsonl", b"".join(lines))
            except (OSError, BotoCoreError, ValueError) as error:  # ValueError: the lease's record is damaged
                if not self._away:
                    what = f"journal not written ({type(error).__name__}: {error}); training goes on"
                    print(what, file=sys.stderr, flush=True)
                self._away = True
                return
            except LeaseLost:  # the loop finds out for itself
                self._ended = True
                return
            self._written, self._away = len(lines), False
            if len(lines) == LINES_PER_FILE:
                with self._lock:
                    del self._lines[:LINES_PER_FILE]
                self._part, self._written = self._part + 1, 0


@dataclass(frozen=True)
class Attempt:
    """A start of the training processes."""

    number: int
    from_step: int
    ranks: int
    time: float  # UNIX
    last_step: int  # that it logged; `from_step` if none
    last_time: float  # UNIX
    gone_back: int | None = None  # times, before it began; None: written by an older version


@dataclass
class History:
    """The attempts of a run in a row."""

    attempts: list[Attempt] = field(default_factory=list)
    steps: list[Line] = field(default_factory=list)  # each logged step once, ascending
    repeated: int = 0  # steps that were done again after a restart, as far as they were logged
    lines: list[Line] = field(default_factory=list)  # of all attempts as they were written, their begins too


class JournalReader:
    """Reads again and again at the cost of what is new: files that something came after do not change any more."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        self._storage, self._folder = storage, journal_folder(run_id)
        self._known: dict[str, list[Line]] = {}

    def read(self) -> History:
        """A line that is torn or no journal's is named on stderr and left out."""
        names = sorted(name for name in self._storage.names(self._folder) if name.endswith(".jsonl"))
        lines: list[Line] = []
        for name in names:
            found = self._known.get(name)
            if found is None:
                found = self._parse(name)
                if name != names[-1]:
                    self._known[name] = found
            lines += found
        return _in_a_row(lines)

    def _parse(self, name: str) -> list[Line]:
        path, found = f"{self._folder}/{name}", []
        for number, text in enumerate((self._storage.read_or_none(path) or b"").splitlines(), start=1):
            try:
                line = json.loads(text)
                if not isinstance(line, dict) or not isinstance(line.get("time"), int | float):
                    raise ValueError("no line with a time")
                if not isinstance(line.get("from_step", line.get("step")), int):
                    raise ValueError("neither the begin of an attempt nor a step")
                found.append(line)
            except ValueError as error:
                where = self._storage.uri(path)
                print(f"{where}: line {number} is left out: {error}", file=sys.stderr, flush=True)
        return found


def read_journal(storage: Storage, run_id: str) -> History:
    """All attempts, with what is torn named on stderr and left out."""
    return JournalReader(storage, run_id).read()


def _in_a_row(lines: list[Line]) -> History:
    history = History(lines=lines)
    kept: dict[int, Line] = {}
    for line in lines:
        if "from_step" in line:
            begun = line["from_step"]
            again = [step for step in kept if step > begun]
            history.repeated += max(again, default=begun) - begun
            for step in again:
                del kept[step]
            number, ranks, at = line.get("attempt", 0), line.get("ranks", 1), line["time"]
            history.attempts.append(Attempt(number, begun, ranks, at, begun, at, line.get("gone_back")))
            continue
        kept[line["step"]] = line
        if history.attempts:
            last = history.attempts[-1]
            history.attempts[-1] = replace(last, last_step=line["step"], last_time=line["time"])
    history.steps = [kept[step] for step in sorted(kept)]
    return history


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
