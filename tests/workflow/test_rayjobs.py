"""The driver against a fake API server over HTTP: every row of how a RayJob can end, and every way the driver can be disturbed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config.load import load_config
from pipeline.workflow.rayjobs import Options, Outcome, StageFailed, StageStatus, options_from, run_stage, stages_of
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


@pytest.fixture
def cluster() -> Iterator[FakeKubernetes]:
    fake = filled()
    yield fake
    fake.close()


def filled() -> FakeKubernetes:
    fake = FakeKubernetes()
    for manifest in templates() + QUEUES:
        fake.apply(manifest)
    return fake


class Driver:
    """run_stage in a thread; `result` is a StageStatus, None (already done) or the exception."""

    def __init__(
        self, cluster: FakeKubernetes, done: Any, stage: str = "prepare", dies_after: int | None = None, **options: Any
    ) -> None:
        self.reports: list[StageStatus] = []
        self.dies_after = dies_after
        self.result: Any = "running"
        self.thread = threading.Thread(target=self._run, args=(cluster, done, stage, Options(**options)), daemon=True)
        self.thread.start()

    def _run(self, cluster: FakeKubernetes, done: Any, stage: str, options: Options) -> None:
        try:
            self.result = run_stage(
                CONFIG, stage, ARGUMENTS, api=cluster.api(), done=done, report=self._report, options=options
            )
        except (StageFailed, InterruptedError) as error:
            self.result = error

    def _report(self, status: StageStatus) -> None:
        self.reports.append(status)
        if self.dies_after is not None and len(self.reports) > self.dies_after:
            raise InterruptedError("the driver's pod was evicted")

    def wait(self, seconds: float = 15.0) -> Any:
        self.thread.join(seconds)
        assert not self.thread.is_alive(), "the driver hangs"
        return self.result

    def outcome(self) -> Outcome:
        result = self.wait()
        return result.outcome if isinstance(result, StageFailed) else Outcome.SUCCEEDED


def until(condition: Any, what: str = "condition") -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError(f"never happened: {what}")


def job_appears(cluster: FakeKubernetes, name: str) -> str:
    until(lambda: cluster.get(name) is not None, f"RayJob {name}")
    return name


ENDINGS = [
    ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, Outcome.SUCCEEDED),
    ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, Outcome.STOPPED),
    ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed"}, Outcome.APPLICATION),
    ({"jobDeploymentStatus": "Failed", "jobStatus": "RUNNING", "reason": "DeadlineExceeded"}, Outcome.DEADLINE),
    ({"jobDeploymentStatus": "Failed", "jobStatus": "", "reason": "PreRunningDeadlineExceeded"}, Outcome.DEADLINE),
    ({"jobDeploymentStatus": "Failed", "jobStatus": "", "reason": "SubmissionFailed"}, Outcome.INFRASTRUCTURE),
    (
        {"jobDeploymentStatus": "Failed", "jobStatus": "RUNNING", "reason": "JobStatusCheckTimeoutExceeded"},
        Outcome.INFRASTRUCTURE,
    ),
    (
        {
            "jobDeploymentStatus": "Failed",
            "jobStatus": "RUNNING",
            "reason": "JobDeploymentStatusTransitionGracePeriodExceeded",
        },
        Outcome.INFRASTRUCTURE,
    ),
    ({"jobDeploymentStatus": "ValidationFailed", "reason": "ValidationFailed"}, Outcome.VALIDATION),
]


@pytest.mark.parametrize(("status", "expected"), ENDINGS)
def test_every_end_has_its_own_outcome(cluster: FakeKubernetes, status: dict[str, str], expected: Outcome) -> None:
    driver = Driver(
        cluster, done=lambda: (cluster.get("debug-prepare-1") or {}).get("status", {}).get("jobStatus") == "SUCCEEDED"
    )
    name = job_appears(cluster, "debug-prepare-1")
    cluster.set_status(name, suspend=False, jobDeploymentStatus="Running", jobStatus="RUNNING")
    cluster.set_status(name, message="details", **status)
    assert driver.outcome() == expected
    assert len({outcome for _, outcome in ENDINGS}) == 6


def test_a_retry_of_kuberay_is_not_a_failure(cluster: FakeKubernetes) -> None:
    """Fact 6: FAILED with Retrying is in the middle of things."""
    finished = threading.Event()
    driver = Driver(cluster, done=finished.is_set)
    name = job_appears(cluster, "debug-prepare-1")
    cluster.set_status(name, suspend=False, jobDeploymentStatus="Retrying", jobStatus="FAILED", reason="AppFailed")
    until(lambda: any(status.deployment_status == "Retrying" for status in driver.reports))
    assert driver.result == "running"
    finished.set()
    cluster.set_status(name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED", reason="")
    assert driver.outcome() == Outcome.SUCCEEDED
    assert [status.phase for status in driver.reports][-1] == "succeeded"


def test_success_without_a_manifest_is_no_success(cluster: FakeKubernetes) -> None:
    driver = Driver(cluster, done=lambda: False)
    cluster.set_status(job_appears(cluster, "debug-prepare-1"), jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    assert driver.outcome() == Outcome.NO_MANIFEST


def test_done_before_means_nothing_is_created(cluster: FakeKubernetes) -> None:
    assert run_stage(CONFIG, "prepare", ARGUMENTS, api=cluster.api(), done=lambda: True) is None
    assert cluster.created == []


def test_deleted_by_hand(cluster: FakeKubernetes) -> None:
    driver = Driver(cluster, done=lambda: False)
    cluster.remove(job_appears(cluster, "debug-prepare-1"))
    assert driver.outcome() == Outcome.DELETED


def test_gone_by_ttl_after_the_manifest_is_success(cluster: FakeKubernetes) -> None:
    finished = threading.Event()
    driver = Driver(cluster, done=finished.is_set)
    name = job_appears(cluster, "debug-prepare-1")
    finished.set()
    cluster.remove(name)
    assert driver.outcome() == Outcome.SUCCEEDED


def test_api_server_away_and_watches_broken(cluster: FakeKubernetes) -> None:
    finished = threading.Event()
    cluster.faults = ["503", "drop", "500", "lost", "429", "drop"] * 3
    driver = Driver(cluster, done=finished.is_set)
    name = job_appears(cluster, "debug-prepare-1")
    for _ in range(3):
        cluster.compact()
        cluster.set_status(name, suspend=False, jobDeploymentStatus="Running", jobStatus="RUNNING")
        cluster.faults += ["gone", "drop", "503"]
        time.sleep(0.02)
    finished.set()
    cluster.set_status(name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    assert driver.outcome() == Outcome.SUCCEEDED
    assert cluster.created == ["debug-prepare-1"]


def test_api_server_away_for_too_long_is_infrastructure(cluster: FakeKubernetes) -> None:
    cluster.faults = ["503"] * 10_000
    with pytest.raises(StageFailed) as error:
        run_stage(CONFIG, "prepare", ARGUMENTS, api=cluster.api(patience_s=0.1), done=lambda: False)
    assert error.value.outcome == Outcome.INFRASTRUCTURE


def test_a_create_whose_answer_was_lost_makes_one_job(cluster: FakeKubernetes) -> None:
    driver = Driver(
        cluster, done=lambda: (cluster.get("debug-prepare-1") or {}).get("status", {}).get("jobStatus") == "SUCCEEDED"
    )
    # requests so far are list, get template, get queue, create: lose the answer of whichever comes, twice
    cluster.faults = [None, None, None, "lost", "lost"]
    cluster.set_status(job_appears(cluster, "debug-prepare-1"), jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    assert driver.outcome() == Outcome.SUCCEEDED
    assert cluster.created == ["debug-prepare-1"]


def test_a_new_driver_follows_the_job_of_a_dead_one(cluster: FakeKubernetes) -> None:
    finished = threading.Event()
    first = Driver(cluster, done=finished.is_set, dies_after=0)
    name = job_appears(cluster, "debug-prepare-1")
    cluster.set_status(name, suspend=False, jobDeploymentStatus="Running", jobStatus="RUNNING")
    assert isinstance(first.wait(), InterruptedError)
    second = Driver(cluster, done=finished.is_set)
    until(lambda: second.reports)
    finished.set()
    cluster.set_status(name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    assert second.outcome() == Outcome.SUCCEEDED
    assert cluster.created == [name]


def test_two_drivers_make_one_job(cluster: FakeKubernetes) -> None:
    finished = threading.Event()
    drivers = [Driver(cluster, done=finished.is_set) for _ in range(2)]
    name = job_appears(cluster, "debug-prepare-1")
    until(lambda: all(driver.reports for driver in drivers))
    finished.set()
    cluster.set_status(name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    assert [driver.outcome() for driver in drivers] == [Outcome.SUCCEEDED] * 2
    assert cluster.created == [name]


def test_another_configuration_under_the_same_run_id_is_refused(cluster: FakeKubernetes) -> None:
    driver = Driver(cluster, done=lambda: False)
    name = job_appears(cluster, "debug-prepare-1")
    with pytest.raises(StageFailed, match="other arguments") as error:
        run_stage(CONFIG, "prepare", ["--config", "debug", "seed=1"], api=cluster.api(), done=lambda: False)
    assert error.value.outcome == Outcome.USAGE
    cluster.remove(name)
    driver.wait()


def test_a_failed_stage_gets_a_new_attempt(cluster: FakeKubernetes) -> None:
    finished = threading.Event()
    driver = Driver(cluster, done=finished.is_set, attempts=2)
    failed = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed"}
    cluster.set_status(job_appears(cluster, "debug-prepare-1"), **failed)
    cluster.set_status(job_appears(cluster, "debug-prepare-2"), **failed)
    assert driver.outcome() == Outcome.APPLICATION
    again = Driver(cluster, done=finished.is_set)  # the same command once more
    name = job_appears(cluster, "debug-prepare-3")
    finished.set()
    cluster.set_status(name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    assert again.outcome() == Outcome.SUCCEEDED


@pytest.mark.parametrize("outcome", ["STOPPED", "deadline"])
def test_a_stopped_or_late_stage_is_not_tried_again(cluster: FakeKubernetes, outcome: str) -> None:
    driver = Driver(cluster, done=lambda: False, attempts=3)
    name = job_appears(cluster, "debug-prepare-1")
    if outcome == "STOPPED":
        cluster.set_status(name, jobDeploymentStatus="Complete", jobStatus="STOPPED")
    else:
        cluster.set_status(name, jobDeploymentStatus="Failed", jobStatus="RUNNING", reason="DeadlineExceeded")
    assert driver.outcome() in (Outcome.STOPPED, Outcome.DEADLINE)
    assert cluster.created == [name]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda cluster: cluster.remove("template-prepare"), "no RayJob template-prepare"),
        (lambda cluster: cluster.objects.pop(("localqueues", "cpu")), "no LocalQueue 'cpu'"),
        (
            lambda cluster: cluster.objects[("rayjobs", "template-prepare")]["spec"].update(
                shutdownAfterJobFinishes=False
            ),
            "shutdownAfterJobFinishes",
        ),
    ],
)
def test_what_the_cluster_lacks_is_said_before_anything_is_created(
    cluster: FakeKubernetes, break_it: Any, message: str
) -> None:
    break_it(cluster)
    with pytest.raises(StageFailed, match=message) as error:
        run_stage(CONFIG, "prepare", ARGUMENTS, api=cluster.api(), done=lambda: False)
    assert error.value.outcome == Outcome.USAGE
    assert cluster.created == []


@pytest.mark.parametrize("code", ["403", "422", "400"])
def test_refused_by_admission_is_not_repeated(cluster: FakeKubernetes, code: str) -> None:
    cluster.faults = [None, None, None, code]
    with pytest.raises(StageFailed) as error:
        run_stage(CONFIG, "prepare", ARGUMENTS, api=cluster.api(), done=lambda: False)
    assert error.value.outcome == Outcome.VALIDATION
    assert [method for method, _ in cluster.requests].count("POST") == 1


@pytest.mark.parametrize(("policy", "expected"), [("detach", Outcome.DETACHED), ("cancel", Outcome.STOPPED)])
def test_sigterm_detaches_or_cancels(cluster: FakeKubernetes, policy: Any, expected: Outcome) -> None:
    def kill(status: StageStatus) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StageFailed) as error:
        run_stage(
            CONFIG,
            "prepare",
            ARGUMENTS,
            api=cluster.api(),
            done=lambda: False,
            report=kill,
            options=Options(on_terminate=policy),
        )
    assert error.value.outcome == expected
    assert (cluster.get("debug-prepare-1") is None) == (policy == "cancel")
    assert signal.getsignal(signal.SIGTERM) == before


def test_stages_of_a_run_in_order(cluster: FakeKubernetes) -> None:
    for stage in ("train", "prepare"):
        driver = Driver(cluster, done=lambda: False, stage=stage)
        name = job_appears(cluster, f"debug-{stage}-1")
        cluster.set_status(name, jobDeploymentStatus="Failed", reason="AppFailed", dashboardURL="head:8265")
        driver.wait()
    found = stages_of(cluster.api(), "debug")
    assert [(status.name, status.queue, status.dashboard_url) for status in found] == [
        ("debug-prepare-1", "cpu", "head:8265"),
        ("debug-train-1", "gpu", "head:8265"),
    ]


def test_options_from_the_environment() -> None:
    assert options_from({}) == Options()
    given_ = {
        "MOONLIGHT_OWNER_NAME": "w",
        "MOONLIGHT_OWNER_UID": "u",
        "MOONLIGHT_PRIORITY": "moonlight-release",
        "MOONLIGHT_ON_TERMINATE": "cancel",
    }
    options = options_from(given_)
    assert options.owner == {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "w", "uid": "u"}
    assert (options.priority, options.on_terminate) == ("moonlight-release", "cancel")
    with pytest.raises(ValueError, match="MOONLIGHT_ON_TERMINATE"):
        options_from({"MOONLIGHT_ON_TERMINATE": "explode"})


STEPS = st.one_of(
    st.sampled_from(["admit", "start", "run", "retry", "evict", "compact", "second driver", "driver dies"]),
    st.sampled_from(["503", "drop", "lost", "gone", "429", "401"]),
)
ENDS = st.sampled_from(["succeed", "succeed without manifest", "stop", "app failed", "deadline", "invalid", "delete"])


@settings(max_examples=50, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(STEPS, max_size=12), end=ENDS)
def test_any_interleaving_of_faults_ends_in_the_truth(steps: list[str], end: str) -> None:
    """No duplicate RayJob, no false success, no hang, whatever the API server, KubeRay, Kueue and the drivers' pods do."""
    cluster = filled()
    try:
        finished = threading.Event()
        drivers = [Driver(cluster, done=finished.is_set)]
        name = job_appears(cluster, "debug-prepare-1")
        for step in steps:
            _play(step, cluster, name, drivers, finished)
        if all(isinstance(driver.result, InterruptedError) for driver in drivers):
            drivers.append(Driver(cluster, done=finished.is_set))
        living = [driver for driver in drivers if driver.dies_after is None]
        until(lambda: all(driver.reports for driver in living), "every driver follows the job")
        _finish(end, cluster, name, finished)
        expected = {
            "succeed": Outcome.SUCCEEDED,
            "succeed without manifest": Outcome.NO_MANIFEST,
            "stop": Outcome.STOPPED,
            "app failed": Outcome.APPLICATION,
            "deadline": Outcome.DEADLINE,
            "invalid": Outcome.VALIDATION,
            "delete": Outcome.DELETED,
        }[end]
        assert [driver.outcome() for driver in living] == [expected] * len(living)
        assert cluster.created == [name]
    finally:
        cluster.close()


def _play(step: str, cluster: FakeKubernetes, name: str, drivers: list[Driver], finished: threading.Event) -> None:
    kuberay = {
        "admit": {"suspend": False, "jobDeploymentStatus": "Initializing"},
        "start": {"jobDeploymentStatus": "Running", "jobStatus": "PENDING"},
        "run": {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"},
        "retry": {"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED", "reason": "AppFailed"},
        "evict": {"suspend": True, "jobDeploymentStatus": "Suspended", "jobStatus": ""},
    }
    if step in kuberay:
        cluster.set_status(name, **kuberay[step])
    elif step == "compact":
        cluster.compact()
    elif step == "second driver":
        drivers.append(Driver(cluster, done=finished.is_set))
    elif step == "driver dies":
        drivers.append(Driver(cluster, done=finished.is_set, dies_after=0))
        drivers[-1].wait()
    else:
        with cluster.lock:
            cluster.faults.append(step)


def _finish(end: str, cluster: FakeKubernetes, name: str, finished: threading.Event) -> None:
    if end == "succeed":
        finished.set()
    status = {
        "succeed": {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"},
        "succeed without manifest": {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"},
        "stop": {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"},
        "app failed": {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed"},
        "deadline": {"jobDeploymentStatus": "Failed", "jobStatus": "RUNNING", "reason": "DeadlineExceeded"},
        "invalid": {"jobDeploymentStatus": "ValidationFailed", "jobStatus": ""},
    }
    if end == "delete":
        cluster.remove(name)
    else:
        cluster.set_status(name, **status[end])
