"""The journal of a run: there while it trains, whole after its end, one curve over several attempts, and never in training's way."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pipeline.config.schema import RunConfig, StorageConfig
from pipeline.lease import give_way, hold
from pipeline.storage import Storage, open_storage
from pipeline.training import journal
from pipeline.training.commits import committed, lease_path
from pipeline.training.journal import Journal, JournalReader, journal_folder, read_journal
from pipeline.training.metrics import TrainProgress
from pipeline.training.trainer import TrainingStopped, train
from tests.training.make import tiny, tiny_dataset
from tests.training.test_metrics import record
from tests.workflow.driver import until


def progress(step: int) -> TrainProgress:
    return TrainProgress(step, 50, step * 90, 900.0, 2.0, None, 0.01, 1.5, 2.0, 3, 2, 0)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(StorageConfig(root=str(tmp_path)))


def attempt(storage: Storage, number: int, from_step: int, steps: range) -> None:
    written = Journal(storage, "run", number, from_step, ranks=2)
    for step in steps:
        written.add(record(step, math.nan if step == 3 else 2.0 + number), progress(step))
    written.close()


def test_attempts_in_a_row_are_one_curve(storage: Storage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(journal, "LINES_PER_FILE", 4)  # parts
    reader = JournalReader(storage, "run")
    assert reader.read().steps == []
    attempt(storage, 1, 0, range(1, 14))
    assert [line["step"] for line in reader.read().steps] == list(range(1, 14))
    attempt(storage, 2, 10, range(11, 21))  # killed after step 13, back to the checkpoint of step 10
    for found in (reader.read(), read_journal(storage, "run")):
        assert [line["step"] for line in found.steps] == list(range(1, 21))
        assert [line["loss"] for line in found.steps] == [3.0, 3.0, None] + [3.0] * 7 + [4.0] * 10
        assert [(each.number, each.from_step, each.last_step, each.ranks) for each in found.attempts] == [
            (1, 0, 13, 2),
            (2, 10, 20, 2),
        ]
        assert found.repeated == 3
    assert found.steps[-1].items() >= {"tokens": 1800, "bias_rate": 0.001, "load_imbalance": [1.25, 2.0], "tokens_per_second": 900.0}.items()  # fmt: skip


def test_a_writer_that_was_taken_for_dead_adds_nothing(storage: Storage, monkeypatch: pytest.MonkeyPatch):
    """What it trained before it heard of its successor is nobody's: the run's time and steps are the successor's."""
    monkeypatch.setattr(journal, "WRITE_S", 0.001)
    path = lease_path("run")
    with hold(storage, path, what="run run", beat_s=600.0) as lease:  # no heartbeat hears of it first
        written = Journal(storage, "run", lease.number, 0, 1, lease.check)
        written.add(record(1, 2.0), progress(1))
        until(lambda: len(read_journal(storage, "run").steps) == 1)
        assert give_way(storage, path) is not None
        written.add(record(2, 2.0), progress(2))
        written._thread.join(60)
        written.close()
    assert [line["step"] for line in read_journal(storage, "run").steps] == [1]


def test_torn_lines_are_named_and_left_out(storage: Storage, capsys: pytest.CaptureFixture[str]):
    attempt(storage, 1, 0, range(1, 4))
    [name] = storage.names(journal_folder("run"))
    path = f"{journal_folder('run')}/{name}"
    lines = storage.read(path).splitlines(keepends=True)
    storage.write(path, b"".join([*lines[:2], b"[1]\n", b'{"time": 1.0}\n', *lines[2:], lines[-1][:20]]))
    assert [line["step"] for line in read_journal(storage, "run").steps] == [1, 2, 3]
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" is left out")[0] for line in said] == [f"{storage.uri(path)}: line {n}" for n in (3, 4, 7)]


def test_a_storage_that_is_away_is_said_once_and_nothing_is_lost(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(journal, "WRITE_S", 0.001)
    tries = []

    def away(*_: object) -> None:
        tries.append(1)
        raise OSError("gone")

    with monkeypatch.context() as outage:
        outage.setattr(Storage, "write", away)
        written = Journal(storage, "run", 1, 0, ranks=1)
        written.add(record(1), progress(1))
        until(lambda: len(tries) > 3, "tries to write")
    written.add(record(2), progress(2))
    written.close()
    assert [line["step"] for line in read_journal(storage, "run").steps] == [1, 2]
    assert capsys.readouterr().err == "journal not written (OSError: gone); training goes on\n"


def test_training_keeps_one_and_its_metrics_stay_the_same(tmp_path: Path):
    """Stopped and continued: the journal has every step of both attempts, with a time; `metrics/` has the bytes of one go."""
    whole, parts = (tiny(str(tmp_path / name), steps=6) for name in ("whole", "parts"))

    def run(config: RunConfig, stop_after: int) -> None:
        seen: list[int] = []
        dataset = tiny_dataset(open_storage(config.storage))
        stop = lambda: len(seen) >= stop_after  # noqa: E731
        train(config, dataset, open_storage(config.storage), report=lambda at: seen.append(at.step), should_stop=stop)

    run(whole, 99)
    with pytest.raises(TrainingStopped):
        run(parts, 2)
    run(parts, 99)
    lines = []
    for config in (whole, parts):
        storage = open_storage(config.storage)
        found = read_journal(storage, "tiny")
        assert [line["step"] for line in found.steps] == list(range(1, 7))
        assert [line["time"] for line in found.steps] == sorted(line["time"] for line in found.steps)
        starts = [0] if config is whole else [0, found.attempts[0].last_step]
        assert [each.from_step for each in found.attempts] == starts
        [newest] = [each for each in committed(storage, "tiny") if each.step == 6]
        lines.append(storage.read(newest.metrics[0].path))
        logged = [json.loads(line) for line in lines[-1].splitlines()]
        assert [{name: line[name] for name in logged[0]} for line in found.steps] == logged
    assert lines[0] == lines[1]
