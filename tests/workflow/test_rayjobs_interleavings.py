"""Random interleavings of faults: no duplicate RayJob, no false success, no hang."""

from __future__ import annotations

import threading

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.workflow.rayjobs import Outcome
from tests.workflow.driver import Driver, filled, job_appears, until
from tests.workflow.fake_kubernetes import FakeKubernetes

STEPS = st.one_of(
    st.sampled_from(["admit", "start", "run", "retry", "evict", "compact", "second driver", "driver dies"]),
    st.sampled_from(["503", "drop", "lost", "gone", "429", "401"]),
)
ENDS = st.sampled_from(["succeed", "succeed without manifest", "stop", "app failed", "deadline", "invalid", "delete"])


@settings(max_examples=50, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(STEPS, max_size=12), end=ENDS)
def test_any_interleaving_of_faults_ends_in_the_truth(steps: list[str], end: str) -> None:
    """Whatever the API server, KubeRay, Kueue and the drivers' pods do."""
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
