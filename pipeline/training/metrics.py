"""What a run says about itself: one JSON line per logged step, and progress for people.

Lines hold only what the run's inputs decide (loss, rates, norms, loads); throughput and times go to `TrainProgress` and
are never stored with them, so two runs of the same configuration write the same bytes. A file covers one checkpoint
interval and is named after the interval's last step:

    <root>/runs/<run_id>/train/metrics/00000400.jsonl        steps 361 ... 400 with checkpoint.every_steps = 40

It is written whole before the checkpoint commits, so a run that starts again from a checkpoint writes the same file
again, never appends, and a checkpoint taken early (on SIGTERM) leaves a partial file that the next start completes.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass

from pipeline.manifest import FileEntry, canonical_json
from pipeline.storage import Storage, sha256_of


@dataclass(frozen=True)
class TrainProgress:
    """How far a run is, at a logged step. `loss` is NaN for a skipped step."""

    step: int
    steps: int
    tokens: int  # seen since the run began
    tokens_per_second: float  # since the previous report
    loss: float  # nats per token of this step
    eta_s: float | None  # None: the rate is not known yet
    learning_rate: float
    gradient_norm: float  # before clipping
    expert_load: float  # tokens of the busiest expert of any layer / mean over that layer's experts
    skipped_steps: int  # since the run began
    spikes: int  # since the run began
    checkpoint_step: int  # newest committed checkpoint, 0 before the first


@dataclass(frozen=True)
class StepRecord:
    """One step as the host sees it, one step later."""

    step: int
    tokens: int
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

    def line(self) -> bytes:
        """Deterministic JSON; what is not finite becomes null."""
        return (
            canonical_json(
                {
                    "step": self.step,
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
    """Lines by checkpoint interval. Lives on rank 0."""

    def __init__(self, storage: Storage, folder: str, every_steps: int, from_step: int) -> None:
        self._storage = storage
        self._folder = folder
        self._every = every_steps
        self._lines: dict[int, bytes] = {}
        if from_step % every_steps:  # the interval has begun: keep what it says up to the checkpoint
            for line in (storage.read_or_none(self._path(from_step)) or b"").splitlines(keepends=True):
                step = json.loads(line)["step"]
                if step <= from_step:
                    self._lines[step] = line

    def add(self, record: StepRecord) -> None:
        self._lines[record.step] = record.line()

    def write(self, step: int) -> None:
        """Store the interval that `step` lies in, as far as it is known."""
        path = self._path(step)
        self._storage.write(
            path, b"".join(self._lines[known] for known in sorted(self._lines) if self._path(known) == path)
        )
        self._lines = {known: line for known, line in self._lines.items() if known > step or self._path(known) == path}

    def entries(self, steps: int) -> tuple[FileEntry, ...]:
        """The files of a run of `steps` steps."""
        found = []
        for end in range(self._every, steps + self._every, self._every):
            path = self._path(end)
            with self._storage.open(path) as file:
                sha256 = sha256_of(file)
                found.append(FileEntry(path=path, bytes=file.tell(), sha256=sha256))
        return tuple(found)

    def _path(self, step: int) -> str:
        return f"{self._folder}/metrics/{math.ceil(step / self._every) * self._every:08d}.jsonl"


class Pace:
    """Tokens per second between reports, and the time left at that rate."""

    def __init__(self, tokens: int, steps: int, total_tokens: int) -> None:
        self._steps = steps
        self._total = total_tokens
        self._tokens = tokens
        self._time = time.monotonic()

    def progress(self, record: StepRecord, now: float, checkpoint_step: int) -> TrainProgress:
        rate = (record.tokens - self._tokens) / max(now - self._time, 1e-9)
        self._tokens, self._time = record.tokens, now
        left = max(self._total - record.tokens, 0)
        return TrainProgress(
            step=record.step,
            steps=self._steps,
            tokens=record.tokens,
            tokens_per_second=rate,
            loss=record.loss,
            eta_s=left / rate if rate > 0 else None,
            learning_rate=record.learning_rate,
            gradient_norm=record.gradient_norm,
            expert_load=max(record.load_imbalance, default=math.nan),
            skipped_steps=record.skipped_steps,
            spikes=record.spikes,
            checkpoint_step=checkpoint_step,
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
