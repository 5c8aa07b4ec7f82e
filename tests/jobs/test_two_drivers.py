"""Two drivers of one stage at once, each with a Ray of its own: one works, the other leaves with exit code 3."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from data_prep.identity import identity, list_corpus
from data_prep.records import lease_path
from jobs import release
from jobs.on_ray import keeper
from jobs.on_ray.local import PREFIX
from jobs.stages.leases import LEASED, refuse_held
from pipeline.config.load import load_config
from pipeline.file_index import read_dataset
from pipeline.lease import Held, hold
from pipeline.publishing import version
from pipeline.storage import Storage, open_storage
from tests.jobs.conftest import TEXT, override

ROOT = Path(__file__).parents[2]
LIMIT_S = 400.0


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


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Where both drivers' clusters lie: a short path, for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield folder
    for each in folder.glob(f"{PREFIX}*"):
        keeper.end(str(each))
    shutil.rmtree(folder, ignore_errors=True)


def drive(arguments: list[str], temporary: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.prepare", *arguments], env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )  # fmt: skip


@contextlib.contextmanager
def standing_still(cluster: str) -> Iterator[None]:
    """No worker of a cluster goes on while the block runs, one that Ray starts meanwhile neither."""
    ended = threading.Event()
    stopped: list[psutil.Process] = []

    def stop() -> None:
        while not ended.wait(0.05):
            for process in set(keeper.members(cluster)) - set(stopped):
                with contextlib.suppress(psutil.NoSuchProcess):
                    title = " ".join(process.cmdline())
                    if title.startswith("ray::") and "Agent" not in title:
                        process.send_signal(signal.SIGSTOP)
                        stopped.append(process)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for process in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_one_driver_prepares_and_one_leaves(arguments: list[str], temporary: Path) -> None:
    """The first one's tasks stand still while the second comes, as if they were long; its own process lives."""
    config = load_config("debug", arguments[2:])
    storage = open_storage(config.storage)
    lease = lease_path(identity(config, list_corpus(config)))
    first = drive(arguments, temporary)
    try:
        deadline = time.monotonic() + LIMIT_S
        while not storage.exists(lease):
            assert time.monotonic() < deadline
            assert first.poll() is None
            time.sleep(0.05)
        (cluster,) = temporary.glob(f"{PREFIX}*")
        with standing_still(str(cluster)):
            second = drive(arguments, temporary)
            _, error = second.communicate(timeout=LIMIT_S)
            assert first.poll() is None
        assert second.returncode == 3, error
        assert "is being written by " in error
        assert f"(process {first.pid})" in error
        assert "take over with `moonlight release`" in error
        _, error = first.communicate(timeout=LIMIT_S)
        assert first.returncode == 0, error
    finally:
        first.kill()
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
