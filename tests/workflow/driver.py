"""A driver in a thread against the fake API server, for tests that disturb it."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.load import load_config
from pipeline.workflow.rayjobs import Options, Outcome, RayJobApi, StageFailed, StageStatus, run_stage
from tests.workflow.fake_kubernetes import FakeKubernetes

REPOSITORY = Path(__file__).parents[2]
CONFIG = load_config("debug", ["storage.root=s3://bucket/runs"])
ARGUMENTS = ["--config", "debug", "storage.root=s3://bucket/runs"]
QUEUES = [
    {
        "apiVersion": "kueue.x-k8s.io/v1beta2",
        "kind": "LocalQueue",
        "metadata": {"name": name},
        "spec": {"clusterQueue": f"moonlight-{name}"},
    }
    for name in ("cpu", "gpu")
]


def templates() -> list[dict[str, Any]]:
    return [
        yaml.safe_load(path.read_text())
        for path in sorted((REPOSITORY / "k8s/stages").glob("*.yaml"))
        if path.stem != "kustomization"
    ]


def filled() -> FakeKubernetes:
    fake = FakeKubernetes()
    for manifest in templates() + QUEUES:
        fake.apply(manifest)
    return fake


class Driver:
    """run_stage in a thread; `result` is a StageStatus, None (already done) or the exception.

    dies_after: the number of states it may report before it is gone; dies_at: the number of answers it may get from the API server.
    """

    def __init__(
        self,
        cluster: FakeKubernetes,
        done: Any,
        stage: str = "prepare",
        dies_after: int | None = None,
        dies_at: int | None = None,
        **options: Any,
    ) -> None:
        self.reports: list[StageStatus] = []
        self.dies_after, self.dies_at = dies_after, dies_at
        self.result: Any = "running"
        self.thread = threading.Thread(target=self._run, args=(cluster, done, stage, Options(**options)), daemon=True)
        self.thread.start()

    def _run(self, cluster: FakeKubernetes, done: Any, stage: str, options: Options) -> None:
        try:
            self.result = run_stage(
                CONFIG,
                stage,
                ARGUMENTS,
                api=self._mortal(cluster.api()),
                done=done,
                report=self._report,
                options=options,
            )
        except (StageFailed, InterruptedError) as error:
            self.result = error

    def _report(self, status: StageStatus) -> None:
        self.reports.append(status)
        if self.dies_after is not None and len(self.reports) > self.dies_after:
            raise InterruptedError("the driver's pod was evicted")

    @property
    def mortal(self) -> bool:
        return self.dies_after is not None or self.dies_at is not None

    @property
    def gone(self) -> bool:
        return isinstance(self.result, InterruptedError)

    def _mortal(self, api: RayJobApi) -> RayJobApi:
        if self.dies_at is not None:
            call, answers = api._call, itertools.count(1)

            def last_calls(*arguments: Any, **options: Any) -> Any:
                answer = call(*arguments, **options)
                if next(answers) == self.dies_at:
                    raise InterruptedError("the driver's pod was evicted")
                return answer

            api._call = last_calls  # type: ignore[method-assign]
        return api

    def wait(self, seconds: float = 180.0) -> Any:
        self.thread.join(seconds)
        assert not self.thread.is_alive(), "the driver hangs"
        return self.result

    def outcome(self) -> Outcome:
        result = self.wait()
        return result.outcome if isinstance(result, StageFailed) else Outcome.SUCCEEDED


def until(condition: Any, what: str = "condition") -> None:
    """Wait for it, long enough for a busy machine."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError(f"never happened: {what}")


def job_appears(cluster: FakeKubernetes, name: str) -> str:
    until(lambda: cluster.get(name) is not None, f"RayJob {name}")
    return name
