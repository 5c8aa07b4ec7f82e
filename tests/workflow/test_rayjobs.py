"""The driver against a fake API server over HTTP: every row of how a RayJob can end, and every way the driver can be disturbed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.workflow.rayjobs import Options, Outcome, StageFailed, StageStatus, options_from, run_stage, stages_of
from tests.workflow.driver import ARGUMENTS, CONFIG, Driver, filled, job_appears, until
from tests.workflow.fake_kubernetes import FakeKubernetes


@pytest.fixture
def cluster() -> Iterator[FakeKubernetes]:
    fake = filled()
    yield fake
    fake.close()


FAILED = {"jobDeploymentStatus": "Failed", "reason": "AppFailed"}
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


def test_a_waiting_job_says_why_and_a_deactivated_one_is_the_end(cluster: FakeKubernetes) -> None:
    driver = Driver(cluster, done=lambda: False)
    name = job_appears(cluster, "debug-prepare-1")
    words = "couldn't assign flavors to pod set workers: insufficient quota"
    cluster.set_workload(name, True, type="QuotaReserved", status="False", reason="Pending", message=words)
    cluster.compact()
    until(lambda: any(status.message == words and status.phase == "queued" for status in driver.reports))
    assert driver.result == "running"
    cluster.set_workload(name, False, type="Evicted", status="True", reason="Deactivated", message="requeued too often")
    cluster.compact()
    assert driver.outcome() == Outcome.GIVEN_UP
    assert "requeued too often" in str(driver.result)


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


def test_a_try_begins_with_its_program_and_before_that_with_its_cluster(cluster: FakeKubernetes) -> None:
    """KubeRay sets both times, and empties the program's when it retries or when Kueue evicts."""
    driver = Driver(cluster, done=lambda: False)
    name = job_appears(cluster, "debug-prepare-1")
    running = {"jobDeploymentStatus": "Running", "startTime": "2026-01-01T00:00:00Z"}
    begun = {"rayJobInfo": {"startTime": "2026-01-01T00:05:00Z"}}
    seen = []
    for status in (
        {},
        running,
        {**begun, "jobStatus": "PENDING"},
        {"jobStatus": "RUNNING"},
        {"jobStatus": "FAILED", **FAILED, "rayJobInfo": {}},
    ):
        cluster.set_status(name, **status)
        seen.append(stages_of(cluster.api(), "debug")[0])
    driver.wait()
    assert [(status.began % 86400, status.at_work) for status in seen] == [
        (0, False),
        (0, False),
        (300, False),
        (300, True),
        (0, False),
    ]
    assert [status.began > 0 for status in seen] == [False, True, True, True, True]


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
    for wrong, told in (
        ({"MOONLIGHT_ON_TERMINATE": "explode"}, "MOONLIGHT_ON_TERMINATE='explode': expected detach or cancel"),
        ({"MOONLIGHT_ATTEMPTS": "0"}, "MOONLIGHT_ATTEMPTS='0': expected a number from 1 on"),
        ({"MOONLIGHT_ATTEMPTS": "two"}, "MOONLIGHT_ATTEMPTS='two'"),
        ({"MOONLIGHT_OWNER_NAME": "w"}, "MOONLIGHT_OWNER_UID name one Workflow: set both or neither"),
        ({"MOONLIGHT_OWNER_UID": "u"}, "MOONLIGHT_OWNER_UID name one Workflow: set both or neither"),
    ):
        with pytest.raises(ValueError, match=told):
            options_from(wrong)
