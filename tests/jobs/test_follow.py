"""A whole run with a follower beside training on a local Ray, killed twice: every checkpoint is judged, in spite of `keep`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.config.schema import StorageConfig
from pipeline.report.curves import page_path, picture_path, read_all
from pipeline.storage import open_storage
from pipeline.training.commits import committed_steps
from pipeline.workflow.record import read_events
from tests.jobs.test_pipeline import REPOSITORY, environment
from tests.jobs.test_retrain import BATCH, LENGTH, arguments

STEPS, EVERY = 400, 50
SETTINGS = [
    f"schedule.total_tokens={STEPS * BATCH * LENGTH}",
    "schedule.learning_rate=[{until: 100%, shape: constant, start: 0.02, end: 0.02}]",
    "schedule.bias_rate=[{until: 100%, rate: 0.0}]",
    f"schedule.global_batch=[{{until: 100%, sequences: {BATCH}}}]",
    f"checkpoint.every_steps={EVERY}",
    "checkpoint.keep=2",
    "evaluation.follow=true",
]


def followers(root: Path) -> list[int]:
    """Process ids of the run's follower, without the shells that Ray starts it with. Ray's processes are nobody's children."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "jobs.evaluate" in line and "--follow" in line and any(str(root) in word for word in line):
            found.append(process.pid)
    return found


@pytest.mark.long
@pytest.mark.timeout(900)
def test_eight_checkpoints_and_a_follower_that_is_killed_twice(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for number in range(40):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"text {number}: the moon rose late. " * 400)
    overrides = arguments(tmp_path, *SETTINGS, "publishing.name=m", "data.max_padding=1.0")
    command = [sys.executable, "-m", "jobs.pipeline", "--config", "debug", *overrides]
    log = (tmp_path / "log").open("w")
    driver = subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stdout=log, stderr=subprocess.STDOUT)
    storage = open_storage(StorageConfig(root=str(tmp_path / "storage")))
    deaths = 0
    while driver.poll() is None:
        judged = len(read_all(storage, "debug"))
        if deaths < 2 and judged > deaths:
            for pid in followers(tmp_path)[:1]:
                os.kill(pid, signal.SIGKILL)
                deaths += 1
        time.sleep(0.2)
    told = (tmp_path / "log").read_text()
    assert driver.returncode == 0, told
    assert deaths == 2
    assert "is started again" in told
    steps = list(range(EVERY, STEPS + 1, EVERY))
    curve = read_all(storage, "debug")
    assert [each.step for each in curve] == steps  # the curve is complete
    tokens = [each.tokens_seen for each in curve]
    assert tokens == sorted(set(tokens))
    events = [event["step"] for event in read_events(storage, "debug") if event["event"] == "judged"]
    assert len(events) == len(set(events))  # none twice
    assert len(events) >= len(steps) - 2  # a kill between a result and its event loses the event
    assert events == sorted(events)  # in order
    assert committed_steps(storage, "debug") == steps[-2:]  # nothing stays for followers that were killed
    assert storage.exists(page_path("debug"))
    assert storage.exists(picture_path("debug"))
    assert "no result of steps" not in told
    assert json.loads(storage.read("models/m/latest.json"))["step"] == STEPS
