"""Random interleavings of faults: no duplicate RayJob, no false success, no hang."""

from __future__ import annotations

import threading

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.workflow.rayjobs import Outcome
from tests.workflow.driver import Driver, filled, job_appears, until
from tests.workflow.fake_kubernetes import FakeKubernetes

NAME = "debug-prepare-1"
FAULTS = st.sampled_from(["503", "drop", "lost", "gone", "429", "401", "409", "500"])
DEATHS = st.integers(1, 8)  # answers of the API server: list, template, queue, create, get, workload, ...
STEPS = st.one_of(
    st.sampled_from(["admit", "start", "run", "retry", "evict", "compact", "second driver", "driver dies"]),
    st.sampled_from(["wait", "template spoilt", "away"]),
    FAULTS,
    DEATHS,
)
ENDS = {
    "succeed": Outcome.SUCCEEDED,
    "succeed without manifest": Outcome.NO_MANIFEST,
    "stop": Outcome.STOPPED,
    "app failed": Outcome.APPLICATION,
    "deadline": Outcome.DEADLINE,
    "lost": Outcome.INFRASTRUCTURE,
    "invalid": Outcome.VALIDATION,
    "delete": Outcome.DELETED,
    "give up": Outcome.GIVEN_UP,
}


@settings(max_examples=50, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    before=st.lists(FAULTS, max_size=6),
    first=st.lists(DEATHS, max_size=2),
    steps=st.lists(STEPS, max_size=12),
    end=st.sampled_from(sorted(ENDS)),
)
def test_any_interleaving_of_faults_ends_in_the_truth(
    before: list[str], first: list[int], steps: list[str | int], end: str
) -> None:
    """Whatever the API server, KubeRay, Kueue and the drivers' pods do.

    before: faults of the very first requests; first: drivers that start at the same time as the one that lives, and die at
    their nth answer.
    """
    cluster = filled()
    try:
        finished = threading.Event()
        cluster.faults += before
        drivers = [Driver(cluster, done=finished.is_set, dies_at=answers) for answers in first]
        drivers.append(Driver(cluster, done=finished.is_set))
        job_appears(cluster, NAME)
        for step in steps:
            _play(step, cluster, drivers, finished)
        living = [driver for driver in drivers if not driver.mortal]
        _all_follow(drivers)  # one that comes later would rightly make another attempt
        assert all(driver.reports for driver in living)
        _finish(end, cluster, finished)
        assert [driver.outcome() for driver in living] == [ENDS[end]] * len(living)
        assert cluster.created == [NAME]
    finally:
        cluster.close()


def _all_follow(drivers: list[Driver]) -> None:
    until(lambda: all(driver.reports or driver.gone for driver in drivers), "every driver follows the job or is gone")


def _play(step: str | int, cluster: FakeKubernetes, drivers: list[Driver], finished: threading.Event) -> None:
    kuberay = {
        "admit": {"suspend": False, "jobDeploymentStatus": "Initializing"},
        "start": {"jobDeploymentStatus": "Running", "jobStatus": "PENDING"},
        "run": {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"},
        "retry": {"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED", "reason": "AppFailed"},
        "evict": {"suspend": True, "jobDeploymentStatus": "Suspended", "jobStatus": ""},
    }
    if step in kuberay:
        cluster.set_status(NAME, **kuberay[str(step)])
    elif step == "compact":
        cluster.compact()
    elif step == "wait":
        cluster.set_workload(NAME, True, type="QuotaReserved", status="False", reason="Pending", message="quota in use")
    elif step == "template spoilt":  # too late to matter
        _all_follow(drivers)
        with cluster.lock:
            cluster.objects[("rayjobs", "template-prepare")]["spec"].pop("suspend", None)
    elif step == "second driver":
        drivers.append(Driver(cluster, done=finished.is_set))
    elif step == "driver dies":
        drivers.append(Driver(cluster, done=finished.is_set, dies_after=0))
        drivers[-1].wait()
    elif isinstance(step, int):
        drivers.append(Driver(cluster, done=finished.is_set, dies_at=step))
    else:
        with cluster.lock:
            cluster.faults += ["503"] * 12 if step == "away" else [step]


def _finish(end: str, cluster: FakeKubernetes, finished: threading.Event) -> None:
    if end == "succeed":
        finished.set()
    status = {
        "succeed": {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"},
        "succeed without manifest": {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"},
        "stop": {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"},
        "app failed": {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed"},
        "deadline": {"jobDeploymentStatus": "Failed", "jobStatus": "RUNNING", "reason": "DeadlineExceeded"},
        "lost": {"jobDeploymentStatus": "Failed", "jobStatus": "RUNNING", "reason": "JobStatusCheckTimeoutExceeded"},
        "invalid": {"jobDeploymentStatus": "ValidationFailed", "jobStatus": ""},
        "give up": {"jobDeploymentStatus": "Suspended", "jobStatus": ""},
    }
    if end == "give up":
        cluster.set_workload(NAME, False, type="Evicted", status="True", reason="Deactivated", message="too often")
    if end == "delete":
        cluster.start_deleting(NAME)
        cluster.remove(NAME)
    else:
        cluster.set_status(NAME, **status[end])
