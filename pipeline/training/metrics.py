"""What a run says about itself: one JSON line per logged step, and progress for people.

Tokens are labels trained on: what padding, ends of rows and documents, and skipped steps leave out is not in them. The
position of the run, by which schedules and the data order go, counts slots: sequences times their length.

Lines hold only what the run's inputs decide (loss, rates, norms, loads); throughput and times go to `TrainProgress` and
to the journal (journal.py), so two runs of the same configuration write the same bytes. A file covers `STEPS_PER_FILE`
steps, whatever the settings of the day, and is named after the last of them:

    <root>/runs/<run_id>/train/metrics/00002000.jsonl        steps 1001 ... 2000

It is written whole, as far as it is known, before a checkpoint commits, and the checkpoint's manifest records its digest. A
run that goes on from a checkpoint takes the lines up to there as recorded and writes the rest again: none is missing and
none is there twice. Lines that were lost in the meantime are named, and the run goes on without them.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from dataclasses import dataclass, fields
from typing import Any

from pipeline.integrity import damage
from pipeline.manifest import FileEntry, canonical_json
from pipeline.storage import Storage
from pipeline.training.times import UNKNOWN, StepTimes

STEPS_PER_FILE = 1000  # part of the format: what a run has logged is found by it


@dataclass(frozen=True)
class TrainProgress:
    """How far a run is, at a logged step. `loss` is NaN for a skipped step."""

    step: int
    steps: int
    tokens: int  # labels trained on since the run began
    tokens_per_second: float  # the same, since the previous report
    loss: float  # nats per token of this step
    eta_s: float | None  # None: the rate is not known yet
    learning_rate: float
    gradient_norm: float  # before clipping
    expert_load: float  # tokens of the busiest expert of any layer / mean over that layer's experts
    skipped_steps: int  # since the run began
    spikes: int  # since the run began
    checkpoint_step: int  # newest committed checkpoint, 0 before the first
    flops_per_second: float = math.nan  # of the model, over all ranks: flops.py times tokens_per_second
    mfu: float = math.nan  # the share of what the processors could do; NaN where that is not known
    times: StepTimes = UNKNOWN  # of the steps that became known since the previous report

    def record(self) -> dict[str, Any]:
        """All of it in one level."""
        return {**{each.name: getattr(self, each.name) for each in fields(self)[:-1]}, **self.times.record()}


@dataclass(frozen=True)
class StepRecord:
    """One step as the host sees it, one step later."""

    step: int
    slots: int  # position after the step
    tokens: int  # labels trained on since the run began
    learning_rate: float
    bias_rate: float
    sequences: int
    loss: float
    aux_loss: float
    gradient_norm: float
    skipped_steps: int
    skipped_in_a_row: int
    spikes: int  # since the run began (spikes.py)
    spikes_in_a_row: int
    stop: bool  # some rank was asked to stop
    load_imbalance: tuple[float, ...]  # per mixture layer: tokens of the busiest expert / mean over experts
    timed: tuple[int, ...] = ()  # earlier steps, of which
    times: tuple[float, ...] = ()  # these are the ranks' times (times.py)

    def line(self) -> bytes:
        """Deterministic JSON; what is not finite becomes null."""
        return (
            canonical_json(
                {
                    "step": self.step,
                    "slots": self.slots,
                    "tokens": self.tokens,
                    "loss": _finite(self.loss),
                    "aux_loss": _finite(self.aux_loss),
                    "learning_rate": self.learning_rate,
                    "bias_rate": self.bias_rate,
                    "global_batch": self.sequences,
                    "gradient_norm": _finite(self.gradient_norm),
                    "load_imbalance": [_finite(value) for value in self.load_imbalance],
                    "skipped_steps": self.skipped_steps,
                    "spikes": self.spikes,
                }
            )
            + b"\n"
        )


class MetricsFiles:
    """Lines by file. Lives on rank 0."""

    def __init__(self, storage: Storage, folder: str, from_step: int = 0, recorded: tuple[FileEntry, ...] = ()) -> None:
        """`recorded`: the files as the checkpoint of `from_step` knows them."""
        self._storage = storage
        self._folder = folder
        self._entries = {entry.path: entry for entry in recorded}
        self._lines: dict[int, bytes] = {}
        begun = self._entries.pop(self._path(from_step), None)
        if begun is not None and from_step % STEPS_PER_FILE:
            self._lines = self._lines_up_to(from_step, begun)
        elif begun is not None:
            self._entries[begun.path] = begun

    def add(self, record: StepRecord) -> None:
        self._lines[record.step] = record.line()

    def write(self, step: int) -> tuple[FileEntry, ...]:
        """Store what is known up to `step`; entries of all files of the run so far."""
        for path in sorted({self._path(known) for known in self._lines}):
            data = b"".join(line for known, line in sorted(self._lines.items()) if self._path(known) == path)
            self._storage.write(path, data)
            self._entries[path] = FileEntry(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        self._lines = {known: line for known, line in self._lines.items() if self._path(known) == self._path(step)}
        if step % STEPS_PER_FILE == 0:
            self._lines = {}
        return tuple(self._entries[path] for path in sorted(self._entries))

    def _lines_up_to(self, step: int, recorded: FileEntry) -> dict[int, bytes]:
        """The lines of a file that were there when the checkpoint of `step` was taken; later ones are written again."""
        data = (self._storage.read_or_none(recorded.path) or b"")[: recorded.bytes]
        if hashlib.sha256(data).hexdigest() != recorded.sha256:
            _say_left_out(f"{self._storage.uri(recorded.path)}: lines up to step {step} are missing or damaged")
            return {}
        return {json.loads(line)["step"]: line for line in data.splitlines(keepends=True)}

    def _path(self, step: int) -> str:
        return f"{self._folder}/metrics/{math.ceil(step / STEPS_PER_FILE) * STEPS_PER_FILE:08d}.jsonl"


def sound_files(storage: Storage, recorded: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
    """The files that are as they were written; others are named on stderr, for a run is worth more than its curve."""
    found = []
    for entry in recorded:
        problem = damage(storage, entry)
        if problem:
            _say_left_out(problem)
        else:
            found.append(entry)
    return tuple(found)


def read_metrics(recorded: tuple[FileEntry, ...], storage: Storage) -> list[dict[str, Any]]:
    """The logged steps in order. A file that was lost or damaged since is named on stderr and left out."""
    found = {}
    for file in sound_files(storage, recorded):
        for line in storage.read(file.path).splitlines():
            record = json.loads(line)
            found[record["step"]] = record
    return [found[step] for step in sorted(found)]


def _say_left_out(what: str) -> None:
    print(f"metrics are left out: {what}", file=sys.stderr, flush=True)


class Pace:
    """Tokens per second between reports, and the time left at the rate of slots: how many tokens are left, nobody knows yet.

    The first step of a process warms up (memory, kernels, the first reads): it says nothing about the time left.
    """

    def __init__(
        self,
        tokens: int,
        slots: int,
        steps: int,
        total_slots: int,
        flops_per_token: float = math.nan,
        peak_flops: float = math.nan,
    ) -> None:
        """flops_per_token: of the model; peak_flops: that all ranks' processors could do in a second."""
        self._flops, self._peak = flops_per_token, peak_flops
        self._steps = steps
        self._total = total_slots
        self._tokens, self._slots = tokens, slots
        self._time = time.monotonic()
        self._warm = False

    def stepped(self, record: StepRecord, now: float) -> None:
        """Tell of every step, after its `progress`: what is measured next begins at the end of the first."""
        if not self._warm:
            self._tokens, self._slots, self._time, self._warm = record.tokens, record.slots, now, True

    def progress(
        self, record: StepRecord, now: float, checkpoint_step: int, times: StepTimes = UNKNOWN
    ) -> TrainProgress:
        seconds = max(now - self._time, 1e-9)
        rate, slot_rate = (record.tokens - self._tokens) / seconds, (record.slots - self._slots) / seconds
        self._tokens, self._slots, self._time = record.tokens, record.slots, now
        left = max(self._total - record.slots, 0)
        return TrainProgress(
            step=record.step,
            steps=self._steps,
            tokens=record.tokens,
            tokens_per_second=rate,
            loss=record.loss,
            eta_s=left / slot_rate if self._warm and slot_rate > 0 else None,
            learning_rate=record.learning_rate,
            gradient_norm=record.gradient_norm,
            expert_load=max(filter(math.isfinite, record.load_imbalance), default=math.nan),
            skipped_steps=record.skipped_steps,
            spikes=record.spikes,
            checkpoint_step=checkpoint_step,
            flops_per_second=rate * self._flops,
            mfu=rate * self._flops / self._peak,
            times=times,
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
