"""A line while nothing is said, by a clock that the test moves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.on_ray import progress
from jobs.on_ray.progress import ProgressLines, Work
from pipeline.config.schema import StorageConfig
from pipeline.storage import Storage, open_storage
from pipeline.workflow import heartbeat
from pipeline.workflow.heartbeat import Heartbeat
from pipeline.workflow.record import ProgressFile, StageProgress
from tests.workflow.driver import until


@pytest.fixture(autouse=True)
def ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """`conftest.no_heartbeat` has set it for all others."""
    monkeypatch.setattr(heartbeat, "QUIET_S", 10.0)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


Told = Callable[[], list[str]]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    return lambda: capsys.readouterr().out.splitlines()


def test_a_line_after_every_ten_seconds_of_silence(told: Told) -> None:
    clock = Clock()
    beats = Heartbeat("train     starting", clock)
    lines = []
    for _ in range(95):
        clock.now += 1
        beats.beat()
        lines += [(clock.now - 1000, line) for line in told()]
    texts = ["10 s", "20 s", "30 s", "40 s", "50 s", "1 min 0 s", "1 min 10 s", "1 min 20 s", "1 min 30 s"]
    assert lines == [(10.0 * (n + 1), f"train     starting, {text}") for n, text in enumerate(texts)]


def test_what_was_said_starts_it_anew_and_nothing_ends_it(told: Told) -> None:
    clock = Clock()
    beats = Heartbeat("", clock)
    clock.now += 100
    beats.beat()
    beats.begin("train     at work, without news")
    clock.now += 9
    beats.beat()
    beats.begin("train     at work, without news")
    clock.now += 9
    beats.beat()
    assert told() == []
    clock.now += 3
    beats.beat()
    beats.begin("")
    clock.now += 100
    beats.beat()
    assert told() == ["train     at work, without news, 12 s"]


def test_it_beats_by_itself_while_its_block_runs(monkeypatch: pytest.MonkeyPatch, told: Told) -> None:
    monkeypatch.setattr(heartbeat, "QUIET_S", 0.0)
    beaten = threading.Event()
    beat = Heartbeat.beat
    monkeypatch.setattr(Heartbeat, "beat", lambda self: (beat(self), beaten.set()))
    with Heartbeat("Ray       starting on this machine"):
        assert beaten.wait(60)
    assert told()[0].startswith("Ray       starting on this machine, ")


@pytest.mark.parametrize("show", [True, False], ids=["driver of a job", "stage that prints its own"])
def test_the_stage_at_work_is_started_until_it_has_news(
    show: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Told
) -> None:
    clock = Clock()
    monkeypatch.setattr(progress, "EVERY_S", 0.002)
    monkeypatch.setattr(progress, "Heartbeat", lambda: Heartbeat(clock=clock))
    storage = open_storage(StorageConfig(root=str(tmp_path)))
    news = StageProgress("train", 40, 120, "steps", 12345.6, "tokens", 95.4)
    looked = watch_begins(monkeypatch)
    with ProgressLines(storage, "debug", show=show) as lines:
        lines.work = Work("train", since=0.0)
        clock.now += 11
        lines._heartbeat.beat()
        assert told() == ["train     starting, 11 s"]
        ProgressFile(storage.config, "debug")(news)
        until(lambda: "train     at work, without news" in looked, "a look at the progress")
        assert told() == [news.line()] * (1 + show)  # the stage's own
        clock.now += 12
        lines._heartbeat.beat()
        assert told() == ["train     at work, without news, 12 s"]
        lines.work = None
        clock.now += 100
        lines._heartbeat.beat()
    assert told() == []


def watch_begins(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    begin = Heartbeat.begin

    def watched(self: Heartbeat, what: str) -> None:
        begin(self, what)
        seen.append(what)

    monkeypatch.setattr(Heartbeat, "begin", watched)
    return seen


def test_a_storage_that_hangs_does_not_silence_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Told) -> None:
    reading = threading.Event()

    def hang(storage: Storage, run_id: str) -> None:
        reading.set()
        threading.Event().wait()

    monkeypatch.setattr(progress, "EVERY_S", 0.002)
    monkeypatch.setattr(progress, "read_progress", hang)
    monkeypatch.setattr(heartbeat, "QUIET_S", 0.0)
    beaten = threading.Event()
    beat = Heartbeat.beat
    monkeypatch.setattr(Heartbeat, "beat", lambda self: (reading.is_set() and beat(self), beaten.set()))
    with ProgressLines(open_storage(StorageConfig(root=str(tmp_path))), "debug") as lines:
        lines.work = Work("train", since=0.0)
        assert reading.wait(60)
        beaten.clear()
        assert beaten.wait(60)
    assert told()[0].startswith("train     starting, ")
