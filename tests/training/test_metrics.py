"""Stored metrics: deterministic lines, whole files by interval, completed after an early stop."""

import json
import math
import time

import pytest
import torch

from pipeline.config.schema import StorageConfig
from pipeline.storage import Storage
from pipeline.training.figures import Fetch, PendingRecord
from pipeline.training.metrics import MetricsFiles, Pace, StepRecord


def record(step: int, loss: float = 2.0) -> StepRecord:
    values = torch.tensor([loss, 0.5, 1.5, 3, 1, 2, 1, 0, 1.25, 2.0], dtype=torch.float64)
    return PendingRecord(step, step * 100, 0.01, 0.001, 8, Fetch(values), 0.0).fetch()


def test_a_line_is_json_even_for_a_bad_step():
    assert json.loads(record(7, math.nan).line()) == {
        "step": 7, "tokens": 700, "loss": None, "aux_loss": 0.5, "learning_rate": 0.01, "bias_rate": 0.001,
        "global_batch": 8, "gradient_norm": 1.5, "load_imbalance": [1.25, 2.0], "skipped_steps": 3, "spikes": 2,
    }  # fmt: skip


def test_a_restart_writes_the_same_files(tmp_path):
    storage = Storage(StorageConfig(root=str(tmp_path)))
    steps = lambda path: [json.loads(line)["step"] for line in storage.read(path).splitlines()]  # noqa: E731

    def run(first: int, last: int, saves: list[int]) -> None:
        files = MetricsFiles(storage, "train", 10, first - 1)
        for step in range(first, last + 1):
            files.add(record(step))
            if step in saves:
                files.write(step)

    run(1, 13, [10, 13])  # stopped early at 13, after a checkpoint
    assert steps("train/metrics/00000020.jsonl") == [11, 12, 13]
    run(14, 17, [])  # killed without a checkpoint
    run(14, 20, [20])
    assert steps("train/metrics/00000020.jsonl") == list(range(11, 21))
    resumed = [storage.read(f"train/metrics/{end:08d}.jsonl") for end in (10, 20)]
    run(1, 20, [10, 20])
    assert resumed == [storage.read(f"train/metrics/{end:08d}.jsonl") for end in (10, 20)]
    assert [entry.path for entry in MetricsFiles(storage, "train", 10, 20).entries(20)] == [
        "train/metrics/00000010.jsonl",
        "train/metrics/00000020.jsonl",
    ]


def test_pace_counts_what_is_left():
    progress = Pace(tokens=0, steps=50, total_tokens=5000).progress(record(10), time.monotonic() + 5, checkpoint_step=8)
    assert (progress.step, progress.steps, progress.tokens, progress.loss) == (10, 50, 1000, 2.0)
    assert (progress.learning_rate, progress.gradient_norm, progress.expert_load) == (0.01, 1.5, 2.0)
    assert (progress.skipped_steps, progress.spikes, progress.checkpoint_step) == (3, 2, 8)
    assert progress.eta_s * progress.tokens_per_second == pytest.approx(4000)
