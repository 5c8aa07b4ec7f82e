"""Two drivers of one stage at once, each with a Ray of its own: one works, the other leaves with exit code 3."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_prep.identity import identity, list_corpus
from data_prep.records import lease_path
from jobs import release
from jobs.stages.leases import LEASED, refuse_held
from pipeline.config.load import load_config
from pipeline.file_index import read_dataset
from pipeline.lease import Held, hold
from pipeline.publishing import version
from pipeline.storage import Storage, open_storage
from tests.jobs.conftest import TEXT, override

ROOT = Path(__file__).parents[2]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "corpus").mkdir()
    for number in range(40):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"{number} {TEXT}")
    return [
        "--config", "debug", f"storage.root={tmp_path / 'runs'}", override(tmp_path / "corpus", format="text", max_epochs=10_000),
        'tokenizer={"vocab_size": 300}', "model.vocab_size=300", "data.max_padding=1.0", "data.sequence_length=128",
        "training.sequence_length=128", "schedule.total_tokens=1024", "cluster.prepare_memory_bytes=100MB",
    ]  # fmt: skip


def drive(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.prepare", *arguments], env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )  # fmt: skip


def tasks_of(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    found = psutil.Process(driver.pid).children(recursive=True)
    return [process for process in found if any("ray::" in word for word in process.cmdline())]


@pytest.mark.long
def test_one_driver_prepares_and_one_leaves(arguments: list[str]) -> None:
    """The first one's tasks stand still while the second comes, as if they were long; its own process lives."""
    config = load_config("debug", arguments[2:])
    storage = open_storage(config.storage)
    lease = lease_path(identity(config, list_corpus(config)))
    first = drive(arguments)
    stopped: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 200
        while not stopped:
            assert time.monotonic() < deadline
            assert first.poll() is None
            if storage.exists(lease):
                stopped = tasks_of(first)
                for process in stopped:
                    process.send_signal(signal.SIGSTOP)
            time.sleep(0.05)
        second = drive(arguments)
        _, error = second.communicate(timeout=200)
        assert second.returncode == 3, error
        assert "is being written by " in error
        assert f"(process {first.pid})" in error
        assert "take over with `moonlight release`" in error
    finally:
        for process in stopped:
            process.send_signal(signal.SIGCONT)
    _, error = first.communicate(timeout=200)
    assert first.returncode == 0, error
    assert read_dataset(storage, identity(config, list_corpus(config))).tokens > 0


@pytest.fixture
def publishing(arguments: list[str]) -> tuple[Storage, str]:
    storage = open_storage(load_config("debug", arguments[2:]).storage)
    return storage, version.lease_path("debug")


def test_a_stage_that_somebody_does_is_refused_before_a_ray_is_started(
    arguments: list[str], publishing: tuple[Storage, str], no_ray: None
) -> None:
    config = load_config("debug", arguments[2:])
    storage, path = publishing
    with hold(storage, path, what="", beat_s=0.1):
        with pytest.raises(Held, match="the model of run debug is being written by"):
            refuse_held("publish", config, storage)
        for stage in ("prepare", "train", "evaluate"):
            refuse_held(stage, config, storage)
    refuse_held("publish", config, storage)


def test_release_takes_every_stage(
    arguments: list[str], publishing: tuple[Storage, str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config("debug", arguments[2:])
    storage, path = publishing
    dataset = lease_path(identity(config, list_corpus(config)))
    with hold(storage, path, what=""), hold(storage, dataset, what=""):
        assert release.main([*arguments, "--stage", "prepare"]) == 0
        assert capsys.readouterr().out.startswith("run debug: prepare taken from ")
        assert release.main(arguments) == 0
        assert capsys.readouterr().out.startswith("run debug: publish taken from ")
    assert release.main(arguments) == 0
    assert capsys.readouterr().out == "run debug: nobody is at work on it\n"
    assert LEASED == ("prepare", "train", "publish")
