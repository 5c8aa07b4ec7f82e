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
from pipeline.evaluation.curves import page_path, picture_path, read_all
from pipeline.storage import open_storage
from pipeline.training.commits import committed_steps
from pipeline.workflow.record import read_events
from tests.jobs.test_pipeline import REPOSITORY, environment

STEPS, EVERY = 16, 2
SETTINGS = [
    f"schedule.total_tokens={STEPS * 8192}",
    f"checkpoint.every_steps={EVERY}",
    "checkpoint.keep=2",
    "evaluation.follow=true",
    "evaluation.max_tokens_per_source=6000",
    "publishing.beats_frequencies=false",
    "publishing.sample_prompts=[]",
]


def followers(driver: psutil.Process) -> list[psutil.Process]:
    """The follower's own processes, not the shells that Ray starts them with."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "jobs.evaluate" in line and "--follow" in line and driver.pid in [each.pid for each in process.parents()]:
            found.append(process)
    return found


@pytest.mark.long
@pytest.mark.timeout(900)
def test_eight_checkpoints_and_a_follower_that_is_killed_twice(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.pipeline", "--config", "debug", *SETTINGS, f"storage.root={tmp_path}"]
    log = (tmp_path / "log").open("w")
    driver = subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stdout=log, stderr=subprocess.STDOUT)
    storage = open_storage(StorageConfig(root=str(tmp_path)))
    deaths = 0
    while driver.poll() is None:
        judged = len(read_all(storage, "debug"))
        if deaths < 2 and judged > deaths:
            for process in followers(psutil.Process(driver.pid)):
                os.kill(process.pid, signal.SIGKILL)
                deaths += 1
                break
        time.sleep(0.2)
    told = (tmp_path / "log").read_text()
    assert driver.returncode == 0, told
    assert deaths == 2
    assert told.count("and is started again") + told.count("ended (") >= 1
    steps = list(range(EVERY, STEPS + 1, EVERY))
    curve = read_all(storage, "debug")
    assert [each.step for each in curve] == steps  # the curve is complete
    tokens = [each.tokens_seen for each in curve]
    assert tokens == sorted(set(tokens))
    events = [event["step"] for event in read_events(storage, "debug") if event["event"] == "judged"]
    assert len(events) == len(set(events))  # none twice
    assert len(events) >= len(steps) - 2  # a kill between a result and its event loses the event
    assert events == sorted(events)  # in order
    assert committed_steps(storage, "debug") == steps[-2:]  # and then `keep` decides again
    assert storage.exists(page_path("debug"))
    assert storage.exists(picture_path("debug"))
    assert "no result of steps" not in told
    assert json.loads(storage.read("models/moonlight-debug/latest.json"))["step"] == STEPS
