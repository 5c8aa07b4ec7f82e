"""The evaluate stage beside training as a RayJob, by the driver against the fake API server."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.drivers import kuberay
from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig
from pipeline.manifest import CheckpointManifest, EvaluationManifest
from pipeline.storage import Storage, open_storage
from pipeline.training.commits import committed_steps
from pipeline.training.retention import evaluated_steps
from pipeline.workflow.rayjobs import Options, Outcome, StageFailed
from pipeline.workflow.record import read_events, read_progress
from tests.evaluation.test_follow import EVERY, STEPS, Killed, Run
from tests.jobs.test_gate import checkpoint
from tests.workflow.driver import job_appears
from tests.workflow.fake_kubernetes import FakeKubernetes

ARGUMENTS = ["--config", "debug", "storage.root=s3://bucket/runs"]


class Following:
    """`_follow` in a thread, whose evaluate stage is done when we say so."""

    def __init__(
        self,
        cluster: FakeKubernetes,
        root: Path,
        patch: pytest.MonkeyPatch,
        config: RunConfig | None = None,
        **settings: Any,
    ) -> None:
        self.done, self.error = threading.Event(), BaseException()
        overrides = [f"storage.root={root}", *(f"{key.replace('__', '.')}={value}" for key, value in settings.items())]
        self.config = config or load_config("debug", overrides)
        self.storage: Storage = open_storage(self.config.storage)
        records = SimpleNamespace(done=lambda stage: self.done.is_set())
        patch.setattr(kuberay.stages, "find", lambda *_, **__: records)
        patch.setattr(kuberay, "FIRST_S", 0.01)
        self.thread = threading.Thread(target=self._run, args=(cluster,), daemon=True)

    def _run(self, cluster: FakeKubernetes) -> None:
        try:
            kuberay._follow(self.config, self.storage, ARGUMENTS, cluster.api(), Options())
        except BaseException as error:
            self.error = error

    def start(self) -> Following:
        self.thread.start()
        return self

    def commit(self) -> Following:
        self.storage.write("runs/debug/train/step-00000001/manifest.json", checkpoint(1).to_json())
        return self

    def wait(self) -> None:
        self.thread.join(180)
        assert not self.thread.is_alive()


def test_it_starts_with_the_first_checkpoint_and_is_made_again_when_it_dies(
    cluster: FakeKubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    following = Following(cluster, tmp_path, monkeypatch, evaluation__follow="true").start()
    following.thread.join(0.3)
    assert cluster.get("debug-evaluate-1") is None  # nothing to judge: no hardware is held
    following.commit()
    for attempt in (1, 2):  # killed twice
        name = job_appears(cluster, f"debug-evaluate-{attempt}")
        job = cluster.get(name)
        assert job is not None
        assert job["spec"]["entrypoint"].startswith(
            "python -m jobs.evaluate --config debug storage.root=s3://bucket/runs --follow"
        )
        cluster.set_status(name, jobDeploymentStatus="Failed", jobStatus="FAILED", reason="AppFailed")
    name = job_appears(cluster, "debug-evaluate-3")
    cluster.set_status(name, jobDeploymentStatus="Failed", jobStatus="RUNNING", reason="DeadlineExceeded")
    name = job_appears(cluster, "debug-evaluate-4")  # training takes longer than a job may
    following.done.set()
    cluster.set_status(name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    following.wait()
    assert type(following.error) is BaseException  # none came
    events = read_events(following.storage, "debug")
    assert {event["name"] for event in events} == {f"debug-evaluate-{attempt}" for attempt in (1, 2, 3, 4)}
    assert read_progress(following.storage, "debug") is None  # that file is training's


def test_eight_checkpoints_are_judged_once_each_though_the_rayjob_dies_twice(
    cluster: FakeKubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a RayJob's pods do is done here by the same function, slower than training commits, and killed in two of them."""
    run = Run(tmp_path)
    run.train()
    following = Following(cluster, tmp_path, monkeypatch, run.config).start()
    killed: list[int] = []

    def judge(checkpoint: CheckpointManifest, with_tasks: bool) -> EvaluationManifest:
        if len(killed) < 2 and len(run.judged) == 2 + 3 * len(killed):
            killed.append(checkpoint.step)
            raise Killed
        return run.judge(checkpoint, with_tasks)

    for attempt in (1, 2, 3):
        name = job_appears(cluster, f"tiny-evaluate-{attempt}")
        cluster.set_status(name, suspend=False, jobDeploymentStatus="Running", jobStatus="RUNNING")
        try:
            done = run.follow(judge)
        except Killed:
            cluster.set_status(name, jobDeploymentStatus="Failed", jobStatus="FAILED", reason="AppFailed")
            continue
        following.done.set()
        cluster.set_status(name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
        break
    following.wait()
    assert type(following.error) is BaseException  # none came
    steps = list(range(EVERY, STEPS + 1, EVERY))
    assert killed == [6, 12]
    assert run.judged == steps == sorted(evaluated_steps(run.storage, "tiny"))  # all 8, once each, in order
    assert done.missing == []
    assert committed_steps(run.storage, "tiny") == [STEPS]  # `keep` is 1: what was judged went, and nothing before
    assert cluster.created == [f"tiny-evaluate-{attempt}" for attempt in (1, 2, 3)]


def test_a_follower_that_keeps_dying_is_given_up(
    cluster: FakeKubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"evaluation__follow": "true", "cluster__max_failures": 0}
    following = Following(cluster, tmp_path, monkeypatch, **settings).commit().start()
    cluster.set_status(
        job_appears(cluster, "debug-evaluate-1"), jobDeploymentStatus="Failed", jobStatus="FAILED", reason="AppFailed"
    )
    following.wait()
    assert isinstance(following.error, StageFailed)
    assert following.error.outcome == Outcome.APPLICATION


def test_without_the_setting_there_is_none(
    cluster: FakeKubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Following(cluster, tmp_path, monkeypatch).commit().start().wait()
    assert "evaluation.follow is off" in capsys.readouterr().out
    assert cluster.get("debug-evaluate-1") is None
