"""What a run tells people about itself: on one line, at most once a second, and never at the price of the work."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from botocore.exceptions import EndpointConnectionError

from pipeline.config.schema import StorageConfig
from pipeline.storage import Storage, open_storage
from pipeline.workflow import record
from pipeline.workflow.duration import duration
from pipeline.workflow.record import (
    ProgressFile,
    StageProgress,
    add_event,
    events_path,
    progress_path,
    read_events,
    read_progress,
    stage_seconds,
)


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return open_storage(StorageConfig(root=str(tmp_path)))
    return open_storage(request.getfixturevalue("s3_root"))


def at(done: int, total: int = 120) -> StageProgress:
    return StageProgress("train", done, total, "steps", 12345.6, "tokens", 95.4, "loss 5.1234")


def test_a_line_of_progress() -> None:
    assert at(40).line() == "train      33%  40/120 steps  loss 5.1234  12,346 tokens/s  1 min 35 s left"
    assert StageProgress("publish", 0, 0, "bytes", 0.0, "bytes", None).line() == "publish    0/0 bytes"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (95, "1 min 35 s"),
        (7300, "2 h 1 min"),
        (4e6, "1,111 h 6 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_progress_is_kept_at_most_once_a_second_and_at_the_end(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_progress(storage, "debug") is None
    clock = iter([100.0, 100.5, 101.0, 101.2])
    monkeypatch.setattr(record, "time", SimpleNamespace(time=lambda: next(clock)))
    show: ProgressFile = pickle.loads(pickle.dumps(ProgressFile(storage.config, "debug")))
    seen = []
    for done in (1, 2, 3, 120):
        show(at(done))
        progress = read_progress(storage, "debug")
        assert progress is not None
        seen.append((progress.done, progress.updated))
    assert seen == [(1, 100.0), (1, 100.0), (3, 101.0), (120, 101.2)]
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert json.loads(storage.read(progress_path("debug")))["note"] == "loss 5.1234"


def test_events_of_concurrent_writers_are_all_there(storage: Storage) -> None:
    assert read_events(storage, "debug") == []
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda number: [add_event(storage, "debug", "e", "train", n=number) for _ in range(3)], range(6)))
    events = read_events(storage, "debug")
    assert sorted(event["n"] for event in events) == sorted([*range(6)] * 3)
    assert {(event["event"], event["stage"]) for event in events} == {("e", "train")}
    assert storage.read(events_path("debug")).count(b"\n") == 18


@pytest.mark.parametrize(
    "error", [OSError("disk full"), EndpointConnectionError(endpoint_url="http://s3", error="refused")]
)
def test_storage_that_is_away_costs_a_line_and_not_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def away(*_: object) -> None:
        raise error

    for method in ("write", "swap", "etag"):
        monkeypatch.setattr(Storage, method, away)
    storage = open_storage(StorageConfig(root=str(tmp_path)))
    add_event(storage, "debug", "started", "train")
    ProgressFile(storage.config, "debug")(at(1))
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith(f"progress not recorded ({type(error).__name__}: ") for line in lines] == [True, True]


def test_a_mistake_in_the_code_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        add_event(open_storage(StorageConfig(root=str(tmp_path))), "debug", "started", "train", what=object())


def test_seconds_of_stages() -> None:
    def event(name: str, stage: str, seconds: float | None = None) -> dict[str, object]:
        return {"event": name, "stage": stage, "time": 0.0} | ({} if seconds is None else {"seconds": seconds})

    killed = [event("started", "train"), event("started", "train"), event("failed", "train", 5.0)]
    finished = [event("started", "train"), event("rayjob", "train"), event("finished", "train", 7.0)]
    prepared = [event("started", "prepare"), event("finished", "prepare", 2.0)]
    assert stage_seconds([]) == {}
    assert stage_seconds([*killed, *finished, *prepared]) == {"prepare": 2.0, "train": 12.0}
    assert list(stage_seconds([*prepared, *killed, *finished])) == ["prepare", "train"]
    again = [event("started", "train"), event("finished", "train", 3.0)]  # with other settings
    assert stage_seconds([*prepared, *killed, *finished, *again]) == {"prepare": 2.0, "train": 3.0}


def test_a_torn_event_is_named_and_left_out(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    add_event(storage, "r", "started", "train")
    whole = storage.read(events_path("r"))
    storage.write(events_path("r"), whole + b'{"event": "fin' + b"\n[]\n" + whole)
    assert [event["event"] for event in read_events(storage, "r")] == ["started", "started"]
    said = capsys.readouterr().err
    assert f"{storage.uri(events_path('r'))}: line 2 is left out" in said
    assert "line 3 is left out: no event" in said


def test_torn_progress_is_named(storage: Storage) -> None:
    for torn in (b'{"stage": "tr', b"{}", b"[]"):
        storage.write(progress_path("r"), torn)
        with pytest.raises(ValueError, match=r"runs/r/progress.json: no record of progress"):
            read_progress(storage, "r")
