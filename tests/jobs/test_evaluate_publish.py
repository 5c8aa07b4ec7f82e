"""The last two stages on a real Ray give what the library gives, and its errors."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from jobs.cli import open_run
from jobs.on_ray.evaluate import evaluate_with_ray
from jobs.on_ray.publish import publish_with_ray
from pipeline.config.schema import HubConfig
from pipeline.evaluation.heldout import evaluate
from pipeline.evaluation.result import manifest_path
from pipeline.lease import Held, hold
from pipeline.publishing.gate import GateError
from pipeline.publishing.version import lease_path
from tests.evaluation.make import folder_digests, make_run, run_config
from tests.evaluation.make_tasks import TASKS, write_tasks
from tests.jobs.test_retrain import arguments, grow
from tests.jobs.test_retrain import run as run_stages
from tests.publishing.fake_hub import TOKEN, Hub, serving

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving(Hub()) as served:
        yield served


@pytest.fixture(scope="module")
def cluster(hub: Hub) -> Iterator[str]:
    """The address of a small local Ray whose nodes know the hub as a pod would."""
    ray.shutdown()
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    env |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        context = ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=10**8)
        yield context.address_info["address"]
        ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_both_stages(tmp_path, capfd, hub):
    made = make_run(run_config(str(tmp_path)))
    tasks = {"tasks": TASKS, "task_folder": str(write_tasks(tmp_path / "tasks", tmp_path / "cache"))}
    section = made.config.evaluation.model_copy(update=tasks)
    made = replace(made, config=made.config.model_copy(update={"evaluation": section}))
    here = evaluate(made.config, made.dataset, made.checkpoint, made.storage, report=lambda _: None)
    made.storage.delete(manifest_path(made.config, made.checkpoint))
    there = evaluate_with_ray(made.config, made.dataset, made.checkpoint, made.storage, print)
    assert there == here
    assert set(TASKS) < there.tasks.keys()

    for count in (2, 3):  # tasks that share the text, the same digits
        made.storage.delete(manifest_path(made.config, made.checkpoint))
        section = made.config.evaluation.model_copy(update={"scoring_tasks": count})
        shared = made.config.model_copy(update={"evaluation": section})
        assert evaluate_with_ray(shared, made.dataset, made.checkpoint, made.storage, print) == here

    manifest = publish_with_ray(made.config, made.train, there, made.dataset, git_commit="abc", report=print)
    assert manifest.git_commit == "abc"
    folder = tmp_path / "models/tiny" / manifest.version
    assert (folder / "manifest.json").exists()
    before = folder_digests(folder)
    shutil.rmtree(tmp_path / "models")
    section = made.config.publishing.model_copy(update={"workers": 3, "hub": HubConfig(repo="people/tiny")})
    several = made.config.model_copy(update={"publishing": section})
    again = publish_with_ray(several, made.train, there, made.dataset, git_commit="abc", report=print)
    assert again == manifest
    assert folder_digests(folder) == before  # the same bytes from three tasks
    on_hub = {path: hashlib.sha256(data).hexdigest() for path, data in hub.content("people/tiny", "main").items()}
    assert on_hub == before
    assert hub.content("people/tiny", "step-00000050") == hub.content("people/tiny", "main")

    with hold(made.storage, lease_path(made.config.run_id), what="", beat_s=0.2), pytest.raises(Held) as held:
        publish_with_ray(made.config, made.train, there, made.dataset, report=print)
    assert str(held.value).startswith(f"the model of run {made.config.run_id} is being written by ")

    section = made.config.publishing.model_copy(update={"max_loss": 0.5})
    gated = made.config.model_copy(update={"publishing": section})
    with pytest.raises(GateError, match=r"^publishing.max_loss: the held-out loss .* is over 0.5"):
        publish_with_ray(gated, made.train, there, made.dataset, report=print)


def test_a_hub_that_refuses_ends_the_command_in_one_line(
    tmp_path: Path, cluster: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
):
    """With exit code 2 and the remedy; the version is in storage, and the same command goes on."""
    grow(tmp_path, 0, 60)
    overrides = arguments(tmp_path, "publishing.name=m", "publishing.hub.repo=people/full")
    run_stages(*open_run("debug", overrides))
    command = [sys.executable, "-m", "jobs.publish", "--config", "debug", *overrides]

    def publish() -> subprocess.CompletedProcess[str]:
        env = os.environ | {"RAY_ADDRESS": cluster}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)

    monkeypatch.setattr(hub, "quota", 0)
    refused = publish()
    said = [line for line in refused.stderr.splitlines() if line.startswith("publish: ")]
    assert (refused.returncode, len(said)) == (2, 1), refused.stdout + refused.stderr
    assert "publishing.hub: people/full, revision step-00000002: the hub answers 403 (Private repository" in said[0]
    assert "Traceback" not in refused.stderr

    monkeypatch.setattr(hub, "quota", 10**12)
    done = publish()
    assert done.returncode == 0, done.stdout + done.stderr
    there = {path: hashlib.sha256(data).hexdigest() for path, data in hub.content("people/full", "main").items()}
    (folder,) = (tmp_path / "storage/models/m").glob("step-*")
    assert there == folder_digests(folder)
