"""Leases on a folder and on a real S3 server. Waiting is played by a clock that the tests turn."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from pipeline import lease
from pipeline.config.schema import StorageConfig
from pipeline.lease import Held, LeaseLost, LeaseRecord, acquire, give_way, hold, living
from pipeline.storage import Storage, open_storage

PATH = "runs/debug/writer.json"


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path) -> Storage:
    if request.param == "folder":
        return open_storage(StorageConfig(root=str(tmp_path)))
    return open_storage(request.getfixturevalue("s3_root"))


class Clock:
    """Stands in for `time`: sleeping turns it, and lets `meanwhile` happen."""

    def __init__(self) -> None:
        self.now = 0.0
        self.meanwhile: Callable[[float], object] = lambda _: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile(self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(lease, "time", made)
    return made


def elsewhere(storage: Storage, **fields: object) -> LeaseRecord:
    """A holder on another machine, of whose process nothing is known here."""
    record = acquire(storage, PATH, what="run debug").model_copy(
        update={"process": "other-boot pid:[1] 7 99", **fields}
    )
    storage.write(PATH, record.to_json())
    return record


def beat(storage: Storage) -> None:
    record = LeaseRecord.model_validate_json(storage.read(PATH))
    storage.write(PATH, record.model_copy(update={"beat": record.beat + 1}).to_json())


def test_numbers_grow_from_holder_to_holder(storage: Storage) -> None:
    numbers = []
    for _ in range(3):
        with hold(storage, PATH, what="run debug") as held:
            held.check()
            numbers.append(held.number)
    assert numbers == [1, 2, 3]


def test_a_deleted_record_does_not_bring_numbers_back(storage: Storage) -> None:
    with hold(storage, PATH, what="run debug", after=7) as held:
        assert held.number == 8


def test_of_many_that_come_at_once_one_gets_a_free_lease(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_wait_for_silence", lambda storage, path, found, what, waiting: _refuse(found, what))
    won, refused = [], []

    def come() -> None:
        try:
            won.append(acquire(storage, PATH, what="run debug"))
        except Held as held:
            refused.append(held.record)

    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert [record.holder for record in refused] == [won[0].holder] * 7


def _refuse(found: LeaseRecord, what: str) -> None:
    raise Held(found, what)


def test_a_living_holder_is_named(storage: Storage, clock: Clock) -> None:
    record = elsewhere(storage, who="ann on node-7 (process 4711)", since="2026-11-28T01:02:03+00:00")
    clock.meanwhile = lambda _: beat(storage)
    told = []
    with pytest.raises(Held) as error:
        acquire(storage, PATH, what="run debug", waiting=lambda holder, seconds: told.append((holder.who, seconds)))
    message = str(error.value)
    assert message.startswith(
        "run debug is being written by ann on node-7 (process 4711), since 2026-11-28T01:02:03+00:00 (holder 1)"
    )
    assert "15 s after its last sign of life the same command takes over" in message
    assert told == [(record.who, 15.0)]
    found = living(storage, PATH)
    assert found is not None
    assert found.holder == record.holder


def test_a_silent_holder_is_followed_after_three_beats(storage: Storage, clock: Clock) -> None:
    elsewhere(storage, beat_s=5.0)
    assert acquire(storage, PATH, what="run debug").number == 2
    assert 15.0 <= clock.now < 17.0


def test_one_last_beat_of_a_dying_holder_is_no_sign_of_life(storage: Storage, clock: Clock) -> None:
    elsewhere(storage, beat_s=5.0)
    given = []

    def last(now: float) -> None:
        if now > 10 and not given:
            given.append(now)
            beat(storage)

    clock.meanwhile = last
    assert acquire(storage, PATH, what="run debug").number == 2
    assert clock.now >= given[0] + 15.0


def test_living_without_a_holder(storage: Storage, clock: Clock) -> None:
    assert living(storage, PATH) is None
    elsewhere(storage)
    assert living(storage, PATH) is None  # silent
    elsewhere(storage, released=True)
    assert living(storage, PATH) is None


def test_a_restart_of_the_same_owner_need_not_wait(storage: Storage, clock: Clock) -> None:
    elsewhere(storage, owner="trainer 1")
    assert acquire(storage, PATH, what="run debug", owner="trainer 1").number == 2
    assert clock.now == 0.0


def test_a_killed_process_of_this_machine_need_not_be_waited_for(tmp_path, clock: Clock) -> None:
    program = (
        "import signal; from pipeline.config.schema import StorageConfig; from pipeline.lease import hold; "
        "from pipeline.storage import open_storage\n"
        f"with hold(open_storage(StorageConfig(root={str(tmp_path)!r})), {PATH!r}, what='run debug'):\n"
        "    print('held', flush=True); signal.pause()"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    storage = open_storage(StorageConfig(root=str(tmp_path)))
    clock.meanwhile = lambda _: beat(storage)
    with pytest.raises(Held):  # it lives, whatever our clock says
        acquire(storage, PATH, what="run debug")
    child.send_signal(signal.SIGKILL)
    child.wait()
    clock.now = 0.0
    assert acquire(storage, PATH, what="run debug").number == 2
    assert clock.now == 0.0


def test_who_was_taken_for_dead_commits_nothing(storage: Storage) -> None:
    with hold(storage, PATH, what="run debug") as sleeper:
        sleeper.check()
        assert not sleeper.lost
        taken = elsewhere(storage, who="ben on node-8 (process 1)", released=False) if give_way(storage, PATH) else None
        assert taken is not None
        with pytest.raises(
            LeaseLost, match=r"run debug has been taken over by ben on node-8 \(process 1\) \(holder 3, this was 1\)"
        ):
            sleeper.check()
        assert sleeper.lost
    assert LeaseRecord.model_validate_json(storage.read(PATH)) == taken  # leaving does not touch it


def test_the_heartbeat_finds_out_by_itself(storage: Storage) -> None:
    with hold(storage, PATH, what="run debug", beat_s=0.01) as sleeper:
        assert give_way(storage, PATH) is not None
        sleeper._thread.join(timeout=60)
        assert sleeper.lost


def test_the_heartbeat_outlasts_an_outage(storage: Storage, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    answers = threading.Event()
    etag = storage.etag
    calls = []

    def away(path: str) -> str | None:
        calls.append(path)
        if len(calls) == 1:
            raise OSError("503 Slow Down")
        answers.set()
        return etag(path)

    with hold(storage, PATH, what="run debug", beat_s=0.01) as held:
        monkeypatch.setattr(storage, "etag", away)
        assert answers.wait(timeout=60)
        held.check()
    assert "lease of run debug not renewed (OSError: 503 Slow Down)" in capsys.readouterr().err


def test_a_damaged_record_is_named(storage: Storage) -> None:
    storage.write(PATH, b'{"number": 1')
    with pytest.raises(ValueError, match=rf"{PATH} is damaged: make sure that nothing writes there, then delete it"):
        acquire(storage, PATH, what="run debug")


def test_giving_way_without_a_holder(storage: Storage) -> None:
    assert give_way(storage, PATH) is None
    with hold(storage, PATH, what="run debug"):
        pass
    assert give_way(storage, PATH) is None


def test_release_takes_a_run_from_whoever_trains_it(tmp_path, capsys) -> None:
    from jobs import release
    from pipeline.training.commits import lease_path

    storage = open_storage(StorageConfig(root=str(tmp_path)))
    command = ["--config", "debug", "--stage", "train", f"storage.root={tmp_path}"]
    with hold(storage, lease_path("debug"), what="run debug") as held:
        assert release.main(command) == 0
        assert "run debug: train taken from " in capsys.readouterr().out
        with pytest.raises(LeaseLost):
            held.check()
    assert release.main(command) == 0
    assert capsys.readouterr().out.endswith("run debug: nobody is at work on it\n")
