"""Stored metrics: deterministic lines, whole files by interval, completed after an early stop."""

import hashlib
import json
import math
import time
from dataclasses import replace

import pytest
import torch

from pipeline.config.schema import StorageConfig
from pipeline.manifest import FileEntry
from pipeline.storage import Storage
from pipeline.training import metrics
from pipeline.training.figures import Fetch, PendingRecord
from pipeline.training.metrics import MetricsFiles, Pace, StepRecord, read_metrics, sound_files


def record(step: int, loss: float = 2.0) -> StepRecord:
    values = torch.tensor([loss, 0.5, 1.5, 90, 3, 1, 2, 1, 0, 1.25, 2.0], dtype=torch.float64)
    return PendingRecord(step, step * 100, 0.01, 0.001, 8, Fetch(values), 0.0).fetch((step - 1) * 90)


def test_a_line_is_json_even_for_a_bad_step():
    assert json.loads(record(7, math.nan).line()) == {
        "step": 7, "slots": 700, "tokens": 630, "loss": None, "aux_loss": 0.5, "learning_rate": 0.01, "bias_rate": 0.001,
        "global_batch": 8, "gradient_norm": 1.5, "load_imbalance": [1.25, 2.0], "skipped_steps": 3, "spikes": 2,
    }  # fmt: skip


def test_a_restart_writes_the_same_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "STEPS_PER_FILE", 10)
    storage = Storage(StorageConfig(root=str(tmp_path)))
    steps = lambda path: [json.loads(line)["step"] for line in storage.read(path).splitlines()]  # noqa: E731

    def run(first: int, last: int, saves: list[int], recorded: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
        files = MetricsFiles(storage, "train", first - 1, recorded)
        for step in range(first, last + 1):
            files.add(record(step))
            if step in saves:
                recorded = files.write(step)
        return recorded

    whole = run(1, 35, [35], ())  # several files in one interval of checkpoints
    assert [entry.path for entry in whole] == [f"train/metrics/{end:08d}.jsonl" for end in (10, 20, 30, 40)]
    contents = [storage.read(entry.path) for entry in whole]
    recorded = run(1, 13, [7, 13], ())
    assert steps("train/metrics/00000020.jsonl") == [11, 12, 13]
    run(14, 17, [17], recorded)  # killed before the checkpoint of step 17 was committed
    recorded = run(14, 20, [20], recorded)
    recorded = run(21, 35, [21, 33, 35], recorded)
    assert recorded == whole
    assert [storage.read(entry.path) for entry in whole] == contents
    assert sound_files(storage, whole) == whole
    assert capsys.readouterr().err == ""


def test_lost_lines_are_named_and_the_run_goes_on(tmp_path, capsys):
    storage = Storage(StorageConfig(root=str(tmp_path)))
    files = MetricsFiles(storage, "train")
    files.add(record(1))
    recorded = files.write(1)
    path = recorded[0].path
    for harm in (lambda: storage.write(path, b"{}\n"), lambda: storage.delete(path)):
        harm()
        files = MetricsFiles(storage, "train", 1, recorded)
        files.add(record(2))
        (entry,) = files.write(2)
        assert json.loads(storage.read(path))["step"] == 2
        assert f"left out: {storage.uri(path)}: lines up to step 1 are missing or damaged" in capsys.readouterr().err
    storage.delete(path)
    assert sound_files(storage, (entry,)) == ()
    assert f"left out: {storage.uri(path)}: the file is missing" in capsys.readouterr().err


def test_pace_counts_what_is_left():
    """Tokens are labels trained on; the time left goes by slots."""
    pace = Pace(tokens=0, slots=0, steps=50, total_slots=5000)
    pace.stepped(record(0), time.monotonic())
    progress = pace.progress(record(10), time.monotonic() + 5, checkpoint_step=8)
    assert (progress.step, progress.steps, progress.tokens, progress.loss) == (10, 50, 900, 2.0)
    assert (progress.learning_rate, progress.gradient_norm, progress.expert_load) == (0.01, 1.5, 2.0)
    assert (progress.skipped_steps, progress.spikes, progress.checkpoint_step) == (3, 2, 8)
    assert progress.eta_s * progress.tokens_per_second == pytest.approx(4000 * 0.9)


@pytest.mark.parametrize("reported", [True, False], ids=["new run", "resumed between two reports"])
def test_the_time_left_does_not_know_the_warm_up(reported: bool):
    """The first step takes 100 s, each other one second."""
    start = time.monotonic()
    pace = Pace(tokens=0, slots=0, steps=50, total_slots=5000)
    if reported:
        assert pace.progress(record(1), start + 100, checkpoint_step=0).eta_s is None
    pace.stepped(record(1), start + 100)
    for step in range(2, 10):
        pace.stepped(record(step), start + 99 + step)
    progress = pace.progress(record(10), start + 109, checkpoint_step=0)
    assert (progress.eta_s, progress.tokens_per_second) == (pytest.approx(40), pytest.approx(90))


@pytest.mark.parametrize("loads", [(math.nan, 2.0, 1.0), (2.0, math.nan, 1.0), (1.0, 2.0, math.nan)])
def test_the_busiest_layer_is_found_beside_one_without_tokens(loads: tuple[float, ...]):
    progress = Pace(0, 0, 50, 5000).progress(replace(record(10), load_imbalance=loads), time.monotonic(), 8)
    assert progress.expert_load == 2.0
    nowhere = Pace(0, 0, 50, 5000).progress(replace(record(10), load_imbalance=(math.nan,)), time.monotonic(), 8)
    assert math.isnan(nowhere.expert_load)


def test_a_step_logged_twice_counts_once_and_a_damaged_file_is_named(tmp_path, capsys):
    storage = Storage(StorageConfig(root=str(tmp_path)))
    files = []
    for name, lines in (("a", [(5, 3.0), (10, 2.0)]), ("b", [(10, 1.0)])):
        data = b"".join(json.dumps({"step": step, "loss": loss}).encode() + b"\n" for step, loss in lines)
        storage.write(name, data)
        files.append(FileEntry(path=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
    assert read_metrics(tuple(files), storage) == [{"step": 5, "loss": 3.0}, {"step": 10, "loss": 1.0}]
    storage.write("a", storage.read("a").replace(b"3.0", b"1.0"))
    assert read_metrics(tuple(files), storage) == [{"step": 10, "loss": 1.0}]
    assert f"metrics are left out: {storage.uri('a')}: sha256 is" in capsys.readouterr().err
