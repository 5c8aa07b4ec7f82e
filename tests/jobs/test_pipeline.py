"""The whole pipeline on real text, in every way a user runs it, must end in the same published bytes.

A shortened demo (20 of 120 steps): once plainly, then killed and run again, submitted to a running cluster, and on an S3
server. `ModelManifest.digest` covers every published file and the digests of everything it was made from.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from moto.server import ThreadedMotoServer

from pipeline.config.schema import StorageConfig
from pipeline.manifest import ModelManifest
from pipeline.publishing import registry
from pipeline.storage import open_storage
from pipeline.training.commits import committed

pytestmark = [pytest.mark.demo, pytest.mark.timeout(1500)]
REPOSITORY = Path(__file__).parents[2]
SHORT = [
    "schedule.total_tokens=163840",
    "checkpoint.every_steps=5",
    "evaluation.max_tokens_per_source=6000",
    "publishing.beats_frequencies=false",  # after 20 steps
]
PROGRESS = re.compile(r"(?:prepare|train|evaluate|publish) +[0-9]+%  .*")
PIPELINE = [sys.executable, "-m", "jobs.pipeline", "--config", "debug", *SHORT]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    plain = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {**plain, "PATH": path, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **more}


def run(*arguments: str, **more: str) -> str:
    done = subprocess.run(
        [*PIPELINE, *arguments], cwd=REPOSITORY, env=environment(**more), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def published(config: StorageConfig) -> ModelManifest:
    storage = open_storage(config)
    latest = registry.latest(storage, "moonlight-debug")
    assert latest is not None
    found = registry.find(storage, "moonlight-debug", latest.version)
    assert found is not None
    assert registry.verify(storage, found) == []
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelManifest]:
    root = tmp_path_factory.mktemp("plain")
    run(f"storage.root={root}")
    return root, published(StorageConfig(root=str(root)))


def test_again_everything_is_up_to_date(plain: tuple[Path, ModelManifest]) -> None:
    root, manifest = plain
    out = run(f"storage.root={root}")
    assert [out.count(f"{stage:<9} up to date") for stage in ("prepare", "train", "evaluate", "publish")] == [
        1,
        1,
        1,
        1,
    ]
    assert manifest.digest in out
    assert "Ray dashboard" not in out  # nothing was started


def test_killed_in_training_it_goes_on_from_the_last_checkpoint(
    plain: tuple[Path, ModelManifest], tmp_path: Path
) -> None:
    storage = open_storage(StorageConfig(root=str(tmp_path)))
    process = subprocess.Popen(
        [*PIPELINE, f"storage.root={tmp_path}"], cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL
    )
    while not committed(storage, "debug"):
        assert process.poll() is None, "ended before its first checkpoint"
        time.sleep(0.2)
    for child in psutil.Process(process.pid).children(recursive=True):
        command = " ".join(child.cmdline())
        if "jobs.train" in command or "RayTrainWorker" in command:
            child.send_signal(signal.SIGKILL)
    assert process.wait(timeout=120) == 1  # the truth about a killed stage
    resumed_from = max(checkpoint.step for checkpoint in committed(storage, "debug"))
    assert 0 < resumed_from < 20

    run(f"storage.root={tmp_path}")
    assert published(StorageConfig(root=str(tmp_path))).digest == plain[1].digest
    lines = storage.read("runs/debug/train/metrics/00001000.jsonl").count(b"\n")
    assert lines == 2  # steps 1 and 5, once


@pytest.fixture
def cluster() -> Iterator[str]:
    """`ray start --head` on ports and in a folder of its own: jobs of several clusters in one folder mix up their heads."""
    ray = str(Path(sys.executable).parent / "ray")
    head = [ray, "start", "--head", "--port=26379", "--dashboard-port=28265", "--num-cpus=2", "--block"]
    folder = tempfile.mkdtemp(prefix="ray-")  # not pytest's: its sockets' paths would be too long
    head.append(f"--temp-dir={folder}")
    process = subprocess.Popen(head, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL)
    address = "http://127.0.0.1:28265"
    deadline = time.monotonic() + 120
    while subprocess.run([ray, "job", "list", "--address", address], env=environment(), capture_output=True).returncode:
        assert time.monotonic() < deadline, "the head does not answer"
        time.sleep(1)
    yield address
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=60)


def test_submitted_as_a_ray_job(plain: tuple[Path, ModelManifest], cluster: str, tmp_path: Path) -> None:
    from ray.job_submission import JobStatus, JobSubmissionClient

    submit = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", cluster, "--working-dir", "."]
    command = ["--", "python", *PIPELINE[1:], f"storage.root={tmp_path}"]
    done = subprocess.run([*submit, *command], cwd=REPOSITORY, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert published(StorageConfig(root=str(tmp_path))).digest == plain[1].digest

    client = JobSubmissionClient(cluster)
    jobs = [job for job in client.list_jobs() if job.metadata and "stage" in job.metadata]
    assert {job.metadata["job_name"] for job in jobs if job.metadata} == {
        f"debug {stage}" for stage in ("prepare", "train", "evaluate", "publish")
    }
    assert {job.status for job in jobs} == {JobStatus.SUCCEEDED}
    for job in jobs:
        told = PROGRESS.findall(client.get_job_logs(str(job.submission_id)))
        assert told, job.submission_id
        assert len(told) == len(set(told)), sorted(told)  # each line of progress once, whoever forwards it


def test_on_s3(plain: tuple[Path, ModelManifest], monkeypatch: pytest.MonkeyPatch) -> None:
    credentials = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in credentials.items():
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer(port=0)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        config = StorageConfig(root="s3://moonlight/runs", endpoint_url=endpoint)
        open_storage(config).fs.mkdir("moonlight")
        run(f"storage.root={config.root}", f"storage.endpoint_url={endpoint}")
        assert published(config).digest == plain[1].digest
        saved = yaml.safe_load(open_storage(config).read("runs/debug/config.yaml"))
        assert saved["storage"]["root"] == config.root
    finally:
        server.stop()
