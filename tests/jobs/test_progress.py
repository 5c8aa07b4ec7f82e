"""What a driver shows of the stage at work: its progress from storage when it changed, no other's, and never at the price of the driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from botocore.exceptions import EndpointConnectionError

from jobs import stages
from jobs.on_ray import progress
from jobs.on_ray.progress import ProgressLines, Work
from jobs.pipeline import main
from pipeline.config.schema import StorageConfig
from pipeline.storage import Storage, open_storage
from pipeline.workflow.record import ProgressFile, StageProgress, note_waiting, progress_path, read_progress
from tests.workflow.driver import REPOSITORY, job_appears, until
from tests.workflow.fake_kubernetes import FakeKubernetes

RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
SUCCEEDED = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
RETRYING = {"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED"}


def at(done: int, stage: str = "train", updated: float = 0.0) -> StageProgress:
    return StageProgress(stage, done, 120, "steps", 12345.6, "tokens", 95.4, "loss 5.1234", updated)


def put(storage: Storage, written: StageProgress) -> None:
    storage.write(progress_path("debug"), json.dumps(asdict(written)).encode())


def began(seconds_ago: float) -> dict[str, dict[str, str]]:
    """KubeRay's word for when the stage's program began."""
    return {"rayJobInfo": {"startTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - seconds_ago))}}


class Looks:
    """Counts the looks into storage, which come every few milliseconds here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = 0
        monkeypatch.setattr(progress, "EVERY_S", 0.002)
        read = progress.read_progress

        def counted(storage: Storage, run_id: str) -> StageProgress | None:
            self.begun += 1
            return read(storage, run_id)

        monkeypatch.setattr(progress, "read_progress", counted)

    def __call__(self) -> None:
        """Wait for one that begins now to end."""
        begun = self.begun
        until(lambda: self.begun >= begun + 2, "a look at the progress")


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    return Looks(monkeypatch)


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return open_storage(StorageConfig(root=str(tmp_path / "runs")))
    return open_storage(request.getfixturevalue("s3_root"))


def test_a_line_when_the_progress_of_what_is_at_work_changed(
    storage: Storage, looks: Looks, capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressLines(storage, "debug") as lines:
        lines.work = Work("train", since=100.0)
        looks()  # nobody has written anything
        for written in (at(39, updated=99.9), at(39, "prepare", updated=100.1)):
            put(storage, written)
            looks()
        note_waiting(storage, "debug", "train", "debug-train-2: running")
        looks()
        assert capsys.readouterr() == ("", "")

        put(storage, at(40, updated=101.0))
        looks()
        put(storage, at(40, updated=102.0))
        looks()
        lines.work = Work("train", since=100.0)  # the same
        looks()
        assert capsys.readouterr().out == f"{at(40).line()}\n"
        put(storage, at(41, updated=103.0))
        looks()
        assert capsys.readouterr().out == f"{at(41).line()}\n"

        lines.work = Work("train", since=104.0)  # the next attempt has not written yet
        looks()
        lines.work = Work("evaluate", since=0.0)
        looks()
        lines.work = None
        put(storage, at(42, updated=105.0))
        lines.work = Work("publish", since=0.0)
        looks()
        assert capsys.readouterr() == ("", "")


def test_a_storage_that_is_away_is_said_once_until_it_is_back(
    storage: Storage, looks: Looks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away(*_: object) -> None:
        raise EndpointConnectionError(endpoint_url="http://s3")

    put(storage, at(40, updated=1.0))
    with ProgressLines(storage, "debug") as lines:
        for _ in range(2):
            with monkeypatch.context() as outage:
                outage.setattr(Storage, "read", away)
                lines.work = Work("train", since=0.0)
                for _ in range(3):
                    looks()
            looks()
    shown = capsys.readouterr()
    said = 'progress cannot be read (EndpointConnectionError: Could not connect to the endpoint URL: "http://s3"); train goes on'
    assert shown.err.splitlines() == [said, said]
    assert shown.out.splitlines() == [at(40).line()]


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"step": 3}'])
def test_a_file_that_is_no_progress_is_said_and_not_shown(
    tmp_path: Path, looks: Looks, capsys: pytest.CaptureFixture[str], data: bytes
) -> None:
    storage = open_storage(StorageConfig(root=str(tmp_path)))
    storage.write(progress_path("debug"), data)
    with ProgressLines(storage, "debug") as lines:
        lines.work = Work("train", since=0.0)
        looks()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("progress cannot be read (")


class Pipeline:
    """`jobs.pipeline --backend kuberay --only prepare` in a thread, in a world where prepare leaves its record."""

    def __init__(self, cluster: FakeKubernetes, config: StorageConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stages, "finished", lambda *_: True)
        self.cluster = cluster
        self.codes: list[int] = []
        where = [f"storage.root={config.root}"]
        where += [f"storage.endpoint_url={config.endpoint_url}"] if config.endpoint_url else []
        arguments = ["--backend", "kuberay", "--only", "prepare", "--config", "debug", *where]
        self.thread = threading.Thread(target=lambda: self.codes.append(main(arguments)), daemon=True)
        self.thread.start()
        self.name = job_appears(cluster, "debug-prepare-1")

    def runs(self) -> None:
        self.cluster.set_status(self.name, suspend=False, **RUNNING, **began(60))

    def ends(self) -> list[int]:
        self.cluster.set_status(self.name, **SUCCEEDED)
        self.thread.join(180)
        return self.codes


def test_the_driver_shows_the_stage_it_follows(
    cluster: FakeKubernetes,
    s3_root: StorageConfig,
    looks: Looks,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    storage = open_storage(s3_root)
    driver = Pipeline(cluster, s3_root, monkeypatch)
    driver.runs()
    until(lambda: (noted := read_progress(storage, "debug")) and "running" in noted.note, "the driver's own note")
    ProgressFile(s3_root, "debug")(at(40, "prepare"))  # what the stage does; prints the line as well
    looks()
    assert driver.ends() == [0]
    out = capsys.readouterr().out.splitlines()
    assert out.count(at(40, "prepare").line()) == 2
    assert out[-1] == "prepare   done"


def test_a_stage_without_progress_is_followed_as_well(
    cluster: FakeKubernetes,
    tmp_path: Path,
    looks: Looks,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    driver = Pipeline(cluster, StorageConfig(root=str(tmp_path / "runs")), monkeypatch)
    driver.runs()
    until(lambda: looks.begun > 0, "a first look")
    looks()
    assert driver.ends() == [0]
    shown = capsys.readouterr()
    assert {line.split(": ")[0] for line in shown.out.splitlines()[1:-1]} == {"prepare   debug-prepare-1"}
    assert shown.err == ""


def refuse() -> None:
    raise EndpointConnectionError(endpoint_url="http://s3")


@pytest.mark.parametrize("outage", [refuse, threading.Event().wait], ids=["refuses", "never answers"])
def test_a_storage_that_is_away_does_not_disturb_the_driver(
    cluster: FakeKubernetes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    outage: Callable[[], None],
) -> None:
    """Only reading the progress fails: what the driver itself reads has its own answer to an outage."""
    reads: list[str] = []

    def away(storage: Storage, run_id: str) -> None:
        reads.append(run_id)
        outage()

    monkeypatch.setattr(progress, "EVERY_S", 0.002)
    monkeypatch.setattr(progress, "read_progress", away)
    driver = Pipeline(cluster, StorageConfig(root=str(tmp_path / "runs")), monkeypatch)
    driver.runs()
    until(lambda: len(reads) > (3 if outage is refuse else 0), "looks at the progress")
    assert driver.ends() == [0]
    assert capsys.readouterr().err.count("progress cannot be read") == (outage is refuse)


def test_a_log_file_holds_each_attempts_own_progress(cluster: FakeKubernetes, tmp_path: Path) -> None:
    """A process of its own, as in a pod. KubeRay retries: what the first try wrote is not the second's."""
    storage = open_storage(StorageConfig(root=str(tmp_path / "runs")))
    code = "import sys; from jobs import pipeline; from jobs.on_ray import progress; progress.EVERY_S = 0.01; sys.exit(pipeline.main(sys.argv[1:]))"
    arguments = ["--backend", "kuberay", "--only", "prepare", "--config", "debug", f"storage.root={storage.root}"]
    log = tmp_path / "log"

    def shown(written: StageProgress) -> bool:
        put(storage, written)  # again and again, as a stage does: the driver's note may have come in between
        return written.line() in log.read_text()

    with log.open("w") as file:
        driver = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "KUBECONFIG": str(tmp_path / "kubeconfig")},
            stdout=file,
        )
    try:
        name = job_appears(cluster, "debug-prepare-1")
        cluster.set_status(name, suspend=False, **RUNNING, **began(600))
        until(lambda: shown(at(40, "prepare", updated=time.time() - 300)), "progress of the first try")
        cluster.set_status(name, **RETRYING)
        until(lambda: "retrying" in log.read_text(), "the retry")
        put(storage, at(41, "prepare", updated=time.time() - 299))  # the first try's last word
        cluster.set_status(name, **RUNNING, **began(200))
        until(lambda: shown(at(30, "prepare", updated=time.time() - 100)), "progress of the second try")
        cluster.set_status(name, jobDeploymentStatus="Complete", jobStatus="STOPPED")
        assert driver.wait(180) == 14
    finally:
        driver.kill()
    lines = [line for line in log.read_text().splitlines() if "steps" in line]
    assert lines == [at(40, "prepare").line(), at(30, "prepare").line()]
