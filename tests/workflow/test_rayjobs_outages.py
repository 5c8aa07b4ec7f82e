"""The driver when the API server, its own pod or the objects around it fail: what it repeats, what it refuses, what it leaves behind."""

from __future__ import annotations

import copy
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.workflow.rayjobs import Options, Outcome, StageFailed, StageStatus, run_stage
from tests.workflow.driver import ARGUMENTS, CONFIG, Driver, filled, job_appears, until
from tests.workflow.fake_kubernetes import FakeKubernetes

FAILED = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed"}
SUCCEEDED = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}


@pytest.fixture
def cluster() -> Iterator[FakeKubernetes]:
    fake = filled()
    yield fake
    fake.close()


class Clock:
    """Time that passes only in sleep."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def __call__(self) -> float:
        return self.now


def run(cluster: FakeKubernetes, api: Any = None, options: Options | None = None, **arguments: Any) -> Any:
    given = {"done": lambda: False, **arguments}
    return run_stage(CONFIG, "prepare", ARGUMENTS, api=api or cluster.api(), options=options, **given)


def test_an_event_ends_the_wait_at_once(cluster: FakeKubernetes) -> None:
    """Not only when the watch does, which here would be in ten minutes."""
    outcomes: list[Outcome] = []

    def drive() -> None:
        try:
            run(cluster, cluster.api(watch_s=600))
        except StageFailed as error:
            outcomes.append(error.outcome)

    driver = threading.Thread(target=drive, daemon=True)
    driver.start()
    name = job_appears(cluster, "debug-prepare-1")
    until(
        lambda: cluster.requests.count(("GET", "/apis/ray.io/v1/namespaces/moonlight/rayjobs")) == 2, "list and watch"
    )
    cluster.set_status(name, **FAILED)
    driver.join(60)
    assert outcomes == [Outcome.APPLICATION]


def test_an_api_server_that_is_away_for_a_minute_costs_nothing(
    cluster: FakeKubernetes, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    cluster.faults = ["503", "drop", "503", "drop", "503", "503"]
    api = cluster.api(pause_s=1.0, longest_pause_s=30.0, patience_s=900.0, sleep=clock.sleep, clock=clock)
    done = iter([True])
    assert run(cluster, api, done=lambda: next(done)) is None
    assert clock.now == 1 + 2 + 4 + 8 + 16 + 30
    (told,) = [
        record for record in caplog.records if record.levelno >= logging.WARNING
    ]  # people hear of it when it lasts
    assert told.getMessage() == "Kubernetes API: 503 InternalError; again in 30.0 s"


def test_a_conflict_is_not_taken_for_an_object_that_exists(cluster: FakeKubernetes) -> None:
    """409 with reason Conflict: two writers met at a quota's counters."""
    cluster.faults = [None, None, None, "409", "409"]
    driver = Driver(cluster, done=lambda: False)
    cluster.set_status(job_appears(cluster, "debug-prepare-1"), **FAILED)
    assert driver.outcome() == Outcome.APPLICATION
    assert [method for method, _ in cluster.requests].count("POST") == 3
    assert cluster.created == ["debug-prepare-1"]


@pytest.mark.parametrize(
    ("faults", "message"),
    [(["no such path"], "rayjobs of ray.io/v1"), ([None, None, "no such path"], "localqueues of kueue")],
)
def test_a_cluster_without_the_operators_says_so(cluster: FakeKubernetes, faults: list[str], message: str) -> None:
    cluster.faults = [*faults]
    with pytest.raises(StageFailed, match=message) as error:
        run(cluster)
    assert error.value.outcome == Outcome.USAGE
    assert cluster.created == []


@pytest.mark.parametrize("answers", [3, 4, 5])
def test_a_driver_that_dies_before_or_after_its_create(cluster: FakeKubernetes, answers: int) -> None:
    """The answers are: list, template, queue, create, and the job itself."""
    assert isinstance(Driver(cluster, done=lambda: False, dies_at=answers).wait(), InterruptedError)
    assert cluster.created == ["debug-prepare-1"] * (answers > 3)
    second = Driver(cluster, done=lambda: False)
    until(lambda: second.reports)
    cluster.set_status("debug-prepare-1", **FAILED)
    assert second.outcome() == Outcome.APPLICATION
    assert cluster.created == ["debug-prepare-1"]


def test_a_job_that_is_being_deleted_is_not_followed(cluster: FakeKubernetes) -> None:
    first = Driver(cluster, done=lambda: False)
    cluster.start_deleting(job_appears(cluster, "debug-prepare-1"))
    finished = threading.Event()
    second = Driver(cluster, done=finished.is_set)
    name = job_appears(cluster, "debug-prepare-2")
    cluster.remove("debug-prepare-1")
    assert first.outcome() == Outcome.DELETED
    finished.set()
    cluster.set_status(name, **SUCCEEDED)
    assert second.outcome() == Outcome.SUCCEEDED


def test_another_job_of_the_same_name_is_not_ours(cluster: FakeKubernetes) -> None:
    driver = Driver(cluster, done=lambda: False)
    name = job_appears(cluster, "debug-prepare-1")
    until(lambda: driver.reports)
    with cluster.lock:
        other = cluster.get(name)
        assert other is not None
        cluster.remove(name)
        del other["metadata"]["uid"]
        cluster.apply(other)
    assert driver.outcome() == Outcome.DELETED


def test_a_template_spoilt_between_two_attempts_ends_the_stage(cluster: FakeKubernetes) -> None:
    driver = Driver(cluster, done=lambda: False, attempts=2)
    name = job_appears(cluster, "debug-prepare-1")
    cluster.objects[("rayjobs", "template-prepare")]["spec"]["rayClusterSpec"].pop("authOptions")
    cluster.set_status(name, **FAILED)
    assert driver.outcome() == Outcome.USAGE
    assert "authOptions" in str(driver.result)
    assert cluster.created == [name]


def test_somebody_elses_second_attempt_is_not_ours(cluster: FakeKubernetes) -> None:
    driver = Driver(cluster, done=lambda: False, attempts=2)
    name = job_appears(cluster, "debug-prepare-1")
    other = copy.deepcopy(cluster.get(name))
    assert other is not None
    other["metadata"] |= {"name": "debug-prepare-2", "uid": "other"}
    other["metadata"]["annotations"]["moonlight.ai/arguments"] = "--config another"
    cluster.apply(other)
    cluster.set_status(name, **FAILED)
    assert driver.outcome() == Outcome.USAGE
    assert "other arguments (--config another)" in str(driver.result)


def test_sigterm_that_cannot_cancel_says_that_the_job_goes_on(cluster: FakeKubernetes) -> None:
    def kill(status: StageStatus) -> None:
        cluster.faults = ["503"] * 10_000
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StageFailed, match="could not be deleted and goes on") as error:
        run(cluster, cluster.api(patience_s=0.05), Options(on_terminate="cancel"), report=kill)
    assert error.value.outcome == Outcome.INFRASTRUCTURE
    assert cluster.get("debug-prepare-1") is not None


def test_sigterm_while_the_api_server_is_away_still_detaches(cluster: FakeKubernetes) -> None:
    def sleep(seconds: float) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    cluster.faults = ["503"]
    with pytest.raises(StageFailed) as error:
        run(cluster, cluster.api(sleep=sleep))
    assert error.value.outcome == Outcome.DETACHED
