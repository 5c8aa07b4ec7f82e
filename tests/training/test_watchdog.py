"""A rank that hangs ends itself and says where it hung."""

import subprocess
import sys
import threading

import pytest

from pipeline.config.schema import StorageConfig
from pipeline.storage import open_storage
from pipeline.training import watchdog
from pipeline.training.watchdog import Watchdog

HANGS = """
import sys, threading
from pipeline.config.schema import StorageConfig
from pipeline.storage import open_storage
from pipeline.training import watchdog

def stuck_in_a_collective():
    threading.Event().wait(60)

watchdog.PEERS_S = 0.1
with watchdog.Watchdog(0.3, open_storage(StorageConfig(root=sys.argv[1])), "hangs", rank=3, world=4) as dog:
    dog.enter("step", 41)
    stuck_in_a_collective()
"""

HOLDS_THE_LOCK = """
from pipeline.training import watchdog

watchdog.GRACE_S = 0.3
with watchdog.Watchdog(0.3) as dog:
    dog.enter("step", 1)
    sum(range(10**12))  # one call of C that lets no other thread run for an hour
"""

BEATS = """
import time
from pipeline.training.watchdog import Watchdog

with Watchdog(3.0) as watchdog:
    for step in range(16):
        time.sleep(0.25)
        watchdog.enter("step", step)
time.sleep(4)  # nothing is armed any more
print("alive")
"""


def run(program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=200)


def test_a_hang_ends_with_stacks_in_storage(tmp_path):
    for rank in (0, 2):
        open_storage(StorageConfig(root=str(tmp_path))).write(f"hangs/step-00000041/rank-{rank:05d}.txt", b"")
    done = run(HANGS, str(tmp_path))
    assert done.returncode == 1
    assert "stuck_in_a_collective" in done.stderr
    assert "no sign of ranks [1]" in done.stderr
    stacks = (tmp_path / "hangs/step-00000041/rank-00003.txt").read_text()
    assert stacks.startswith("rank 3 hangs in step of step 41, for ")
    assert "stuck_in_a_collective" in stacks


def test_all_ranks_wait_for_each_others_stacks(tmp_path):
    left = threading.Barrier(3)
    storage = open_storage(StorageConfig(root=str(tmp_path)))
    dogs = [Watchdog(0.1, storage, "hangs", rank, 2, leave=lambda _: left.wait(60)) for rank in range(2)]
    for dog in dogs:
        dog.__enter__()
        dog.enter("save", 7)
    left.wait(60)
    for dog in dogs:
        dog.__exit__(None, None, None)
    assert sorted(path.name for path in (tmp_path / "hangs/step-00000007").iterdir()) == [
        "rank-00000.txt",
        "rank-00001.txt",
    ]


def test_a_call_that_holds_the_interpreters_lock_ends_too():
    done = run(HOLDS_THE_LOCK)
    assert done.returncode == 1
    assert "Timeout" in done.stderr


def test_beats_keep_it_alive():
    """In a process of its own, which a watchdog that is wrong would end."""
    done = run(BEATS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")


def test_the_limit_follows_the_steps(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    dog = Watchdog(1800.0)
    limits = []
    for step in range(1, 9):
        dog.enter("step", step)
        limits.append(dog.limit())
        now[0] += 30.0
    assert limits == [1800.0] * 5 + [600.0] * 3  # 20 times the median once five steps are known
    dog.enter("save", 8)
    assert dog.limit() == 1800.0
    now[0] += 500.0
    dog.enter("step", 9)  # what a save took is no step
    assert dog.limit() == 600.0


def test_short_steps_are_given_time(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    for timeout, expected in ((1800.0, 120.0), (60.0, 60.0)):
        dog = Watchdog(timeout)
        for step in range(9):
            dog.enter("step", step)
            now[0] += 0.5
        assert dog.limit() == expected
