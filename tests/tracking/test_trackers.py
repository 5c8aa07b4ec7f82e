"""Trackers hold what the run's own metrics hold, by the readers that belong to them, also after a crash, and never stand in training's way."""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs import track
from pipeline.config.load import ConfigError, dump_yaml
from pipeline.config.schema import RunConfig, StorageConfig
from pipeline.lease import give_way, hold
from pipeline.storage import Storage, open_storage
from pipeline.tracking import follow
from pipeline.tracking import tensorboard as tensorboard_tracker
from pipeline.tracking.follow import Sender
from pipeline.tracking.names import NAMES, named
from pipeline.tracking.records import Records
from pipeline.tracking.tracker import RunName, check, run_name
from pipeline.training import journal
from pipeline.training.commits import lease_path
from pipeline.training.journal import Journal, journal_folder
from pipeline.training.left_out import Detour, LeftOut, left_out_path
from pipeline.training.trainer import TrainingStopped, train
from tests.training.make import BATCH, Watched, spiking_data, tiny, tiny_dataset
from tests.training.test_journal import progress
from tests.training.test_metrics import record

STEPS, DIES = 9, 7
Curves = dict[str, dict[int, float]]  # by name and step


def stored(root: Path) -> Curves:
    """What `metrics/*.jsonl` says, under the trackers' names."""
    found: Curves = defaultdict(dict)
    for path in sorted((root / "runs/tiny/train/metrics").iterdir()):
        for text in path.read_text().splitlines():
            line = json.loads(text)
            for name, value in named(line).items():
                found[name][line["step"]] = value
    return dict(found)


def run_of(root: Path, *trackers: str, **tracking: Any) -> RunConfig:
    return tiny(str(root), steps=STEPS, tracking={"trackers": trackers, "offline": True, **tracking})


def _dies(config: RunConfig) -> None:
    """Killed without a word after a step that no checkpoint has, when the trackers had time to hear of it."""
    follow.EVERY_S = 0.05
    seen: list[int] = []
    trackers_heard = follow.Sender._add

    def add(sender: Sender, tracker: Any, records: Any) -> None:
        trackers_heard(sender, tracker, records)
        seen.append(tracker.last_step)

    def report(at: Any) -> None:
        if at.step == DIES:
            while not seen or seen[-1] < DIES - 2:
                time.sleep(0.01)
            os._exit(9)

    follow.Sender._add = add  # type: ignore[method-assign]
    journal.WRITE_S = 0.01
    storage = open_storage(config.storage)
    train(config, tiny_dataset(storage), storage, report=report)


def after_a_crash(config: RunConfig) -> None:
    """Train, die, train to the end."""
    child = multiprocessing.get_context("spawn").Process(target=_dies, args=(config,))
    child.start()
    child.join(300)
    assert child.exitcode == 9
    Watched().train(config)


def in_tensorboard(folder: Path) -> tuple[Curves, int]:
    """By TensorBoard's own reader, and how many values it read."""
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    series = {tag: read.Scalars(tag) for tag in read.Tags()["scalars"]}
    curves = {tag: {event.step: event.value for event in events} for tag, events in series.items()}
    return curves, sum(len(events) for events in series.values())


def same(found: Curves, expected: Curves, rel: float) -> None:
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=rel), name


def test_tensorboard_after_a_crash(tmp_path: Path) -> None:
    config = run_of(tmp_path, "tensorboard")
    after_a_crash(config)
    curves, values = in_tensorboard(tmp_path / "runs/tiny/train/tensorboard")
    expected = stored(tmp_path)
    assert sorted(expected["train/loss"]) == list(range(1, STEPS + 1))
    same(curves, expected, rel=1e-6)  # it keeps 32 bits
    assert values == sum(len(values) for values in curves.values())  # no step twice
    assert {"time/data", "time/step", "perf/tokens_per_second"} <= curves.keys()


def test_a_tracker_named_later_gets_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By `moonlight track`, from the metrics alone where the journal is lost; asked again it has nothing to send."""
    plain = run_of(tmp_path)
    Watched().train(plain)
    for file in (tmp_path / journal_folder("tiny")).iterdir():
        file.unlink()
    (tmp_path / "run.yaml").write_text(dump_yaml(plain))
    arguments = ["--config", str(tmp_path / "run.yaml")]
    assert track.main(arguments) == 2
    assert "tracking.trackers: names none" in capsys.readouterr().err
    for sent in (STEPS, 0):
        assert track.main([*arguments, 'tracking.trackers=["tensorboard"]']) == 0
        assert capsys.readouterr().out == f"tensorboard: {sent} steps that it did not have\n"
    same(in_tensorboard(tmp_path / "runs/tiny/train/tensorboard")[0], stored(tmp_path), rel=1e-6)


def test_files_are_closed_and_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard_tracker, "RECORDS", 4)
    storage = open_storage(StorageConfig(root=str(tmp_path)))
    for steps in (range(1, 11), range(11, 15)):
        opened = tensorboard_tracker.TensorBoard(storage, "tb")
        assert opened.last_step == steps[0] - 1
        for step in steps:
            opened.add(step, 1e9 + step, {"x": step / 7})
            opened.flush()
    assert len(list((tmp_path / "tb").iterdir())) == 4
    curves, _ = in_tensorboard(tmp_path / "tb")
    assert curves["x"] == pytest.approx({step: step / 7 for step in range(1, 15)})


class Away:
    """A tracker whose server comes and goes."""

    def __init__(self) -> None:
        self.kept: dict[int, dict[str, float]] = {}
        self.up = True

    def module(self) -> ModuleType:
        made = ModuleType("pipeline.tracking.away")
        made.open_run = lambda *_: self.open()  # type: ignore[attr-defined]
        return made

    def open(self) -> Any:
        self.answer()
        self.last_step, self.new = max(self.kept, default=0), {}
        return self

    def answer(self) -> None:
        if not self.up:
            raise ConnectionError("nobody there")

    def add(self, step: int, time: float, values: dict[str, float]) -> None:
        assert step not in self.kept
        self.new[step] = values

    def flush(self) -> None:
        self.answer()
        self.kept |= self.new
        self.new = {}

    def close(self) -> None:
        pass


def test_a_server_that_is_away_is_said_once_and_caught_up_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Away()
    monkeypatch.setitem(sys.modules, "pipeline.tracking.away", server.module())
    storage = open_storage(StorageConfig(root=str(tmp_path)))
    sender = Sender("away", run_of(tmp_path), storage)
    assert sender.send()  # there is nothing yet, so nobody was asked
    written = Journal(storage, "tiny", 1, 0, ranks=1)

    def logged(*steps: int) -> None:
        nonlocal written
        for step in steps:
            written.add(record(step, math.nan if step == 2 else 2.0), progress(step))
        written.close()
        written = Journal(storage, "tiny", 2, steps[-1], ranks=1)

    logged(1, 2, 3)
    assert sender.send()
    server.up = False
    logged(4, 5)
    assert not sender.send()
    assert not sender.send()
    said = capsys.readouterr().err
    assert said == "away does not get the run's records now (ConnectionError: nobody there); training goes on\n"
    server.up = True
    logged(6)
    assert sender.send()
    assert sorted(server.kept) == [1, 2, 3, 4, 5, 6]
    assert "train/loss" not in server.kept[2]  # of a skipped step
    server.up = False
    logged(7)
    assert not sender.send()
    assert capsys.readouterr().err == said  # it was back in between
    written.close()


def test_a_trainer_that_was_taken_for_dead_sends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its successor sends what the run has since become, and a tracker would show it twice."""
    server = Away()
    monkeypatch.setitem(sys.modules, "pipeline.tracking.away", server.module())
    storage, path = open_storage(StorageConfig(root=str(tmp_path))), lease_path("tiny")
    written = Journal(storage, "tiny", 1, 0, ranks=1)
    written.add(record(1, 2.0), progress(1))
    written.close()
    with hold(storage, path, what="run tiny", beat_s=600.0) as lease:  # no heartbeat hears of it first
        sender = Sender("away", run_of(tmp_path), storage, lease.check)
        assert give_way(storage, path) is not None
        assert not sender.send()
        assert server.kept == {}
    assert "(LeaseLost: run tiny has been taken over by" in capsys.readouterr().err
    assert Sender("away", run_of(tmp_path), storage).send()
    assert sorted(server.kept) == [1]


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_root: StorageConfig) -> None:
    storage = open_storage(StorageConfig(root=str(tmp_path)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"^tracking.trackers: mlflow is not installed; pip install 'moonlight-pipeline\[mlflow\]'"
    ):
        check(run_of(tmp_path, "mlflow"), storage, here=True)
    check(run_of(tmp_path, "mlflow"), storage, here=False)  # it runs elsewhere
    there = run_of(tmp_path, "wandb").model_copy(update={"storage": s3_root})
    with pytest.raises(ValueError, match=r"^tracking.folder: wandb may write to a disk, and storage.root is on S3"):
        check(there, Storage(s3_root), here=False)
    for tracker, to_a_server in (("mlflow", "mlflow_uri"), ("trackio", "trackio_url")):
        run = run_of(tmp_path, tracker, **{to_a_server: "http://host:5000"})
        check(run.model_copy(update={"storage": s3_root}), Storage(s3_root), here=False)  # nothing needs a disk
    for tracking, message in (
        ({"trackers": ["mlflow", "mlflow"]}, "tracking.trackers: .*name each tracker once"),
        ({"trackers": ["comet"]}, "tracking.trackers"),
        ({"folder": "s3://bucket/x"}, "tracking.folder: .*trackers write to a disk"),
        ({"trackio_url": "models/space"}, "tracking.trackio_url: .*http"),
        (
            {"trackio_url": "https://host/?write_token=x"},
            "tracking.trackio_url: holds a token; set TRACKIO_WRITE_TOKEN",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny(str(tmp_path), tracking=tracking)


def test_a_run_that_went_back_goes_on_under_another_name(tmp_path: Path) -> None:
    storage, config = open_storage(StorageConfig(root=str(tmp_path))), run_of(tmp_path)
    first = run_name(config, storage)
    detour = Detour(spike=7, back_to=4, left_out=(32, 56), loss=9.0, gradient_norm=1.0)
    storage.write(left_out_path("tiny"), LeftOut(detours=(detour,)).to_json())
    second = run_name(config, storage)
    assert (first.name, second.name) == ("tiny", "tiny-way-2")
    assert first.key != second.key
    assert tensorboard_tracker.folder_name(config, RunName("p", "tiny-way-2", "k")) == "tensorboard-tiny-way-2"


def test_a_run_that_goes_back_while_it_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tracker has of steps that were undone stays as it was, and the way that counts is whole under a name of its own."""
    spikes = {"action": "go_back", "horizon_steps": 10, "go_back_steps": 5}
    config = tiny(str(tmp_path), steps=20, training__spikes=spikes, checkpoint__every_steps=4, checkpoint__keep=9)
    storage, folder = open_storage(config.storage), tmp_path / "runs/tiny/train"
    spiking_data(monkeypatch)(13 * BATCH)
    sender = Sender("tensorboard", config, storage)
    asked = iter([False] * 11)
    with pytest.raises(TrainingStopped, match="stopped after step 12"):
        Watched().train(config, should_stop=lambda: next(asked, True))
    assert sender.send()
    before = in_tensorboard(folder / "tensorboard")
    assert max(before[0]["train/loss"]) == 12
    seen = Watched()
    seen.train(config)
    assert [progress.step for progress in seen.progress][:3] == [13, 14, 9]
    assert sender.send()
    assert in_tensorboard(folder / "tensorboard") == before
    curves, values = in_tensorboard(folder / "tensorboard-tiny-way-2")
    assert sorted(curves["train/loss"]) == list(range(1, 21))
    same(curves, stored(tmp_path), rel=1e-6)
    assert values == sum(len(values) for values in curves.values())


def test_records_know_lost_lines_from_the_metrics(tmp_path: Path) -> None:
    config = run_of(tmp_path)
    Watched().train(config)
    (file,) = (tmp_path / journal_folder("tiny")).iterdir()
    lines = file.read_text().splitlines(keepends=True)
    again = lines[0].replace('"from_step": 0', '"from_step": 6')
    file.write_text("".join([*lines[:4], again, *lines[7:]]))  # steps 4 to 6 are lost, and a second attempt goes on
    found = Records(open_storage(config.storage), "tiny").read()
    assert [each["step"] for each in found] == list(range(1, STEPS + 1))
    assert ["time" in each for each in found] == [True] * 3 + [False] * 3 + [True] * 3


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(sorted(NAMES)), st.one_of(st.none(), st.floats(-1e9, 1e9)), max_size=9))
def test_names(values: dict[str, float | None]) -> None:
    known = {key: value for key, value in values.items() if value is not None}
    assert named({**values, "step": 3, "load_imbalance": [1.5, None]}) == {
        **{NAMES[key]: value for key, value in known.items()},
        "train/load_imbalance/layer_00": 1.5,
    }
