"""What a signal does to a command that trains: the workers are asked, once, and a second signal leaves at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jobs.on_ray.signals import Interrupted
from jobs.on_ray.stop import run_until_signal
from pipeline.config.schema import StorageConfig
from pipeline.storage import open_storage
from pipeline.training.commits import committed
from tests.signals import heed_sigint


class Flag:
    """Stands in for the actor."""

    def __init__(self) -> None:
        self.times = 0
        self.set = threading.Event()

    def ask(self) -> None:
        self.times += 1
        self.set.set()


def test_without_a_signal() -> None:
    assert run_until_signal(lambda: "done", Flag()) == ("done", None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_and_waited_for(number: int) -> None:
    flag, before = Flag(), signal.getsignal(number)

    def work() -> str:
        os.kill(os.getpid(), number)
        assert flag.set.wait(60)
        return "stopped after step 7"

    assert run_until_signal(work, flag) == ("stopped after step 7", number)
    assert flag.times == 1
    assert signal.getsignal(number) is before


def test_a_second_signal_leaves_at_once() -> None:
    flag, ended = Flag(), threading.Event()

    def work() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.set.wait(60)
        os.kill(os.getpid(), signal.SIGINT)
        ended.wait(60)

    with pytest.raises(Interrupted, match="stopped by SIGINT; run the same command to go on"):
        run_until_signal(work, flag)
    ended.set()


def test_what_the_work_raises_is_raised() -> None:
    def work() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run_until_signal(work, Flag())


CHEAP = ["evaluation.max_tokens_per_source=2000", "publishing.sample_prompts=[]", "publishing.beats_frequencies=false"]


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("number", "group", "code"), [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143), (signal.SIGKILL, False, -9)]
)
def test_a_stopped_pipeline_goes_on_from_its_checkpoint(tmp_path: Path, number: int, group: bool, code: int) -> None:
    """On a local Ray: Ctrl-C in a terminal goes to the whole group, SIGTERM and `kill -9` to the command. Nothing is left running."""
    settings = [f"storage.root={tmp_path}", "schedule.total_tokens=163840", "checkpoint.every_steps=5", *CHEAP]
    command = [sys.executable, "-m", "jobs.pipeline", "--config", "debug", *settings]
    log = tmp_path / "log"
    with log.open("w") as out:
        first = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=heed_sigint
        )
        storage = open_storage(StorageConfig(root=str(tmp_path)))
        while not committed(storage, "debug"):
            assert first.poll() is None, log.read_text()
            time.sleep(0.2)
        os.killpg(first.pid, number) if group else first.send_signal(number)
        assert first.wait(300) == code, log.read_text()
    steps = [manifest.step for manifest in committed(storage, "debug")]
    if code > 0:
        assert steps[-1] % 5 or len(steps) > 1  # one of its own, at the step it was in
    again = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [manifest.step for manifest in committed(storage, "debug")][-1] == 20
