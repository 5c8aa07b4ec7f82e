"""One stage of a run as a Kueue-queued RayJob: create or find it, watch it to its end, tell the truth about it.

`run_stage` may be killed at any point and called again, and any number of drivers may work on one run:

1. List the stage's RayJobs. An unfinished one is followed, whoever made it. Otherwise the caller's `done()` is asked (a
   faster driver may have finished), and attempt n + 1 is created. The name is a function of (run, stage, attempt), so of two
   drivers exactly one creates and the other finds it.
2. Follow it by get + watch (`rayjobs_api`), reading BOTH status fields: `Complete` with `STOPPED` is a cancelled job, `FAILED`
   with `Retrying` is not the end, and `ValidationFailed` is an end that never becomes `Failed`.
3. Success is jobStatus SUCCEEDED and `done()`: the stage's manifest is in storage. Log streams are never consulted.

Queue time costs nothing: deadlines are the RayJob's own and count from admission. While a job waits, its status carries Kueue's reason, and a
workload that Kueue deactivated is the end: nothing would ever start it. SIGTERM while following either detaches (the
job goes on and the next driver finds it: right for an evicted pod) or cancels (deletes the RayJob), by `Options.on_terminate`.
Status names: KubeRay v1.7.0 `rayjob_types.go`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import re
import shlex
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

from pipeline.config.schema import RunConfig
from pipeline.workflow.rayjobs_api import ApiUnavailable, NotServed, RayJobApi, Refused, connect
from pipeline.workflow.rayjobs_template import (
    ARGUMENTS_ANNOTATION,
    OVERRIDES_ANNOTATION,
    QUEUE_ANNOTATION,
    QUEUE_LABEL,
    RUN_LABEL,
    STAGE_LABEL,
    STAGES,
    RayJob,
    attempt_of,
    instantiate,
    job_name,
    template_name,
    unsafe,
)

__all__ = [
    "ApiUnavailable",
    "NotServed",
    "Options",
    "Outcome",
    "RayJobApi",
    "Refused",
    "StageFailed",
    "StageStatus",
    "connect",
    "options_from",
    "overrides_of",
    "run_stage",
    "stages_of",
]

log = logging.getLogger(__name__)


class Outcome(IntEnum):
    """How a stage ended; the value is the driver's exit code."""

    SUCCEEDED = 0
    USAGE = 2  # no template, an unsafe one, no queue, another configuration under the same run_id
    CLOSED = 4  # a gate before publishing is closed: no RayJob is made
    APPLICATION = 10  # the stage's own program failed, backoffLimit used up
    DEADLINE = 11  # activeDeadlineSeconds or preRunningDeadlineSeconds
    INFRASTRUCTURE = 12  # KubeRay lost the job, or the API server or the storage stayed away
    VALIDATION = 13  # KubeRay, Kueue or an admission policy refused the object
    STOPPED = 14  # stopped from outside, or cancelled on SIGTERM
    DELETED = 15  # the RayJob was deleted before it finished
    NO_MANIFEST = 16  # Ray says SUCCEEDED but the stage's manifest is not in storage
    GIVEN_UP = 17  # Kueue deactivated the workload: its gang was not ready in time too often, or somebody did it
    DETACHED = 143  # SIGTERM: this driver left, the job goes on


REASONS = {
    "AppFailed": Outcome.APPLICATION,
    "DeadlineExceeded": Outcome.DEADLINE,
    "PreRunningDeadlineExceeded": Outcome.DEADLINE,
    "ValidationFailed": Outcome.VALIDATION,
}
WORTH_ANOTHER_ATTEMPT = {Outcome.APPLICATION, Outcome.INFRASTRUCTURE}


@dataclass(frozen=True)
class StageStatus:
    """What `progress.json` and `jobs.status` show of a stage's RayJob."""

    name: str
    stage: str
    attempt: int
    job_status: str = ""  # "", PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED
    deployment_status: str = (
        ""  # "", Initializing, Running, Complete, Failed, ValidationFailed, Suspended, Retrying, ...
    )
    reason: str = ""
    message: str = ""
    dashboard_url: str = ""  # host:port inside the cluster
    ray_cluster: str = ""
    queue: str = ""
    began: float = 0.0  # UNIX time: of the present try's program, before that of its cluster; 0: of neither

    @property
    def at_work(self) -> bool:
        """Does the stage's program run, in a try whose beginning is known?"""
        return self.phase == "running" and self.job_status == "RUNNING" and self.began > 0

    @property
    def phase(self) -> str:
        """One word for people: queued, starting, running, retrying, or how it ended."""
        if self.deployment_status in ("", "Suspended", "Suspending"):
            return "queued"
        if self.deployment_status == "Initializing":
            return "starting"
        if self.deployment_status == "Complete":
            return self.job_status.lower()
        return self.deployment_status.lower()


class StageFailed(Exception):
    """A stage that did not succeed. `outcome` is the exit code's class, `status` the last state seen."""

    def __init__(self, outcome: Outcome, message: str, status: StageStatus | None = None) -> None:
        super().__init__(message)
        self.outcome = outcome
        self.status = status


@dataclass(frozen=True)
class Options:
    priority: str = "moonlight-interactive"  # WorkloadPriorityClass
    attempts: int = 1  # RayJobs one call may create; each of them retries by itself (backoffLimit)
    on_terminate: Literal["detach", "cancel"] = "detach"
    owner: dict[str, Any] | None = None  # ownerReference: the job is deleted with it


def options_from(environ: Mapping[str, str]) -> Options:
    """From the variables that `k8s/workflows` sets: MOONLIGHT_PRIORITY, MOONLIGHT_ATTEMPTS, MOONLIGHT_ON_TERMINATE, MOONLIGHT_OWNER_NAME and _UID."""
    on_terminate = environ.get("MOONLIGHT_ON_TERMINATE", "detach")
    if on_terminate not in ("detach", "cancel"):
        raise ValueError(f"MOONLIGHT_ON_TERMINATE={on_terminate!r}: expected detach or cancel")
    attempts = environ.get("MOONLIGHT_ATTEMPTS", "1")
    if not re.fullmatch("[1-9][0-9]{0,3}", attempts):
        raise ValueError(f"MOONLIGHT_ATTEMPTS={attempts!r}: expected a number from 1 on")
    owner = None
    name, uid = environ.get("MOONLIGHT_OWNER_NAME"), environ.get("MOONLIGHT_OWNER_UID")
    if bool(name) != bool(uid):
        raise ValueError("MOONLIGHT_OWNER_NAME and MOONLIGHT_OWNER_UID name one Workflow: set both or neither")
    if uid:
        owner = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": name, "uid": uid}
    return Options(
        priority=environ.get("MOONLIGHT_PRIORITY", Options.priority),
        attempts=int(attempts),
        on_terminate="cancel" if on_terminate == "cancel" else "detach",
        owner=owner,
    )


def status_of(job: RayJob) -> StageStatus:
    labels, status = job["metadata"].get("labels", {}), job.get("status") or {}
    return StageStatus(
        name=job["metadata"]["name"],
        stage=labels.get(STAGE_LABEL, ""),
        attempt=attempt_of(job),
        job_status=status.get("jobStatus", ""),
        deployment_status=status.get("jobDeploymentStatus", ""),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        dashboard_url=status.get("dashboardURL", ""),
        ray_cluster=status.get("rayClusterName", ""),
        queue=labels.get(QUEUE_LABEL, ""),
        began=_began(status),
    )


def _began(status: Mapping[str, Any]) -> float:
    """KubeRay sets both anew for each retry and after each eviction; the head's clock counts for the first."""
    time = status.get("rayJobInfo", {}).get("startTime") or status.get("startTime")
    return datetime.datetime.fromisoformat(time).timestamp() if time else 0.0


def judge(job: RayJob) -> Outcome | None:
    """How the RayJob ended; None while it may still change."""
    status = status_of(job)
    if status.deployment_status == "ValidationFailed":
        return Outcome.VALIDATION
    if status.deployment_status == "Failed":
        return REASONS.get(status.reason, Outcome.INFRASTRUCTURE)
    if status.deployment_status == "Complete":
        return {"SUCCEEDED": Outcome.SUCCEEDED, "STOPPED": Outcome.STOPPED}.get(status.job_status, Outcome.APPLICATION)
    return None


def stages_of(api: RayJobApi, run_id: str) -> list[StageStatus]:
    """Every attempt of every stage of a run that still exists in the cluster, in order."""
    found = [status_of(job) for job in api.find(f"{RUN_LABEL}={run_id}")]
    order = {stage: index for index, stage in enumerate(STAGES)}
    return sorted(found, key=lambda status: (order.get(status.stage, len(order)), status.attempt))


def run_stage(
    config: RunConfig,
    stage: str,
    arguments: Sequence[str],
    *,
    api: RayJobApi,
    done: Callable[[], bool],
    report: Callable[[StageStatus], None] = lambda status: None,
    options: Options | None = None,
) -> StageStatus | None:
    """Bring one stage to its end as a RayJob and return its last state (None: already done, nothing was created).

    arguments: what follows `python -m jobs.<stage>` in the stage's pod, e.g. ["--config", "debug", "storage.root=s3://..."].
    done: is the stage's manifest in storage? Asked before an attempt is created and after one succeeded.
    report: called with every new state.
    Raises StageFailed; its `outcome` is the exit code. Idempotent: call it again after any failure or death.
    """
    options = options or Options()
    with _terminated_by_signal(), _told(stage):
        name: str | None = None
        try:
            job = _newest(api, config.run_id, stage)
            if job is None or _ended(job):
                if done():
                    return None
                attempt = attempt_of(job) + 1 if job else 1
                name = job_name(config.run_id, stage, attempt)
                job = _create(api, config, stage, attempt, arguments, options)
            for remaining in reversed(range(options.attempts)):
                name = job["metadata"]["name"]
                _check_same_request(job, stage, arguments)
                status, outcome = _follow(api, job, done, report)
                if outcome == Outcome.SUCCEEDED:
                    return status
                if not remaining or outcome not in WORTH_ANOTHER_ATTEMPT:
                    raise StageFailed(outcome, _explain(outcome, status), status)
                log.warning("%s; trying again", _explain(outcome, status))
                name = job_name(config.run_id, stage, status.attempt + 1)
                job = _create(api, config, stage, status.attempt + 1, arguments, options)
            raise AssertionError("attempts is at least 1")
        except _Terminated:
            if options.on_terminate == "cancel" and name:
                _cancel(api, stage, name)
                raise StageFailed(Outcome.STOPPED, f"{stage}: cancelled on SIGTERM, {name} deleted") from None
            raise StageFailed(
                Outcome.DETACHED, f"{stage}: SIGTERM; {name or 'its RayJob'} goes on, run the same command to follow it"
            ) from None


def overrides_of(api: RayJobApi, stage: str) -> list[str]:
    """section.key=value ... that the stage's template adds to the run's own; none where there is no template. Raises StageFailed."""
    with _told(stage):
        template = api.get(template_name(stage)) or {"metadata": {}}
    return shlex.split(template["metadata"].get("annotations", {}).get(OVERRIDES_ANNOTATION, ""))


@contextlib.contextmanager
def _told(stage: str) -> Iterator[None]:
    """What the API server does to a request, as an outcome of the stage."""
    try:
        yield
    except Refused as error:
        raise StageFailed(Outcome.VALIDATION, f"{stage}: the cluster refused the request: {error}") from error
    except NotServed as error:
        raise StageFailed(Outcome.USAGE, f"{stage}: {error}") from error
    except ApiUnavailable as error:
        raise StageFailed(Outcome.INFRASTRUCTURE, f"{stage}: {error}") from error


def _newest(api: RayJobApi, run_id: str, stage: str) -> RayJob | None:
    jobs = api.find(f"{RUN_LABEL}={run_id},{STAGE_LABEL}={stage}")
    unfinished = [job for job in jobs if not _ended(job)]
    return max(unfinished or jobs, key=attempt_of, default=None)


def _ended(job: RayJob) -> bool:
    return judge(job) is not None or "deletionTimestamp" in job["metadata"]


def _create(
    api: RayJobApi, config: RunConfig, stage: str, attempt: int, arguments: Sequence[str], options: Options
) -> RayJob:
    """Attempt `attempt`, created by this driver or by one that was faster."""
    template = api.get(template_name(stage))
    if template is None:
        raise StageFailed(
            Outcome.USAGE,
            f"{stage}: no RayJob {template_name(stage)} in namespace {api.namespace}; apply k8s/stages (kubectl apply -k k8s/overlays/<overlay>)",
        )
    if problems := unsafe(template):
        raise StageFailed(
            Outcome.USAGE, f"{stage}: template {template_name(stage)} is not safe to run: {'; '.join(problems)}"
        )
    queue = template["metadata"]["annotations"][QUEUE_ANNOTATION]
    if not api.queue_exists(queue):
        raise StageFailed(
            Outcome.USAGE,
            f"{stage}: no LocalQueue {queue!r} in namespace {api.namespace}: the job would wait for ever; apply k8s/queues",
        )
    try:
        wanted = instantiate(
            template, config, stage, attempt, arguments, priority=options.priority, owner=options.owner
        )
    except ValueError as error:
        raise StageFailed(Outcome.USAGE, f"{stage}: {error}") from error
    name = job_name(config.run_id, stage, attempt)
    job = api.create(wanted) or api.get(name)
    if job is None:
        raise StageFailed(Outcome.DELETED, f"{stage}: RayJob {name} was deleted while it was being created")
    return job


def _cancel(api: RayJobApi, stage: str, name: str) -> None:
    """Delete the job on the way out. Whoever sent SIGTERM will not wait for long: SIGKILL ends this if the API server is away."""
    try:
        api.delete(name)
    except (ApiUnavailable, Refused) as error:
        raise StageFailed(
            Outcome.INFRASTRUCTURE, f"{stage}: SIGTERM, but {name} could not be deleted and goes on: {error}"
        ) from error


def _check_same_request(job: RayJob, stage: str, arguments: Sequence[str]) -> None:
    """A run_id means one configuration: refuse to follow a job that was started with another."""
    name = job["metadata"]["name"]
    found = job["metadata"].get("annotations", {}).get(ARGUMENTS_ANNOTATION)
    if found != shlex.join(arguments):
        raise StageFailed(
            Outcome.USAGE,
            f"{stage}: {name} is running with other arguments ({found}); wait for it, delete it (kubectl delete rayjob {name}), or use another run_id",
        )


def _follow(
    api: RayJobApi, job: RayJob, done: Callable[[], bool], report: Callable[[StageStatus], None]
) -> tuple[StageStatus, Outcome]:
    seen: StageStatus | None = None
    last = status_of(job)
    for state in api.changes(last.name):
        # Gone: by hand, with its owner, or by its TTL while the API server was away. Somebody may have made another of its name since.
        if state is None or state["metadata"]["uid"] != job["metadata"]["uid"]:
            return last, Outcome.SUCCEEDED if done() else Outcome.DELETED
        last, outcome = status_of(state), judge(state)
        if last.phase == "queued":
            workload = api.workload(state["metadata"]["uid"]) or {}
            last = dataclasses.replace(last, message=_why_waiting(workload) or last.message)
            if workload.get("spec", {}).get("active") is False:
                outcome = Outcome.GIVEN_UP
        if last != seen:
            report(last)
            seen = last
        if outcome == Outcome.SUCCEEDED and not done():
            return last, Outcome.NO_MANIFEST
        if outcome is not None:
            return last, outcome
    raise AssertionError("changes() ends with None")


def _why_waiting(workload: dict[str, Any]) -> str:
    """Kueue's own words for a workload that is not admitted."""
    conditions = {entry["type"]: entry for entry in workload.get("status", {}).get("conditions", [])}
    reserved = conditions.get("QuotaReserved", {})
    evicted = conditions.get("Evicted", {})
    if reserved.get("status") == "False":
        return str(reserved.get("message", ""))
    return str(evicted.get("message", "")) if evicted.get("status") == "True" else ""


def _explain(outcome: Outcome, status: StageStatus) -> str:
    """One line: what happened, to which object, and KubeRay's own words."""
    words = {
        Outcome.APPLICATION: "the stage's program failed",
        Outcome.DEADLINE: "a deadline passed",
        Outcome.INFRASTRUCTURE: "KubeRay lost the job",
        Outcome.VALIDATION: "KubeRay refused the RayJob",
        Outcome.STOPPED: "the job was stopped",
        Outcome.DELETED: "the RayJob was deleted before it finished",
        Outcome.GIVEN_UP: "Kueue gave up on the job; delete the RayJob and run again",
        Outcome.NO_MANIFEST: "Ray reports success but the stage's manifest is not in storage",
    }
    detail = " ".join(f"{status.reason} {status.message}".split())
    return f"{status.stage}: {words[outcome]} ({status.name}{': ' + detail if detail else ''})"


class _Terminated(BaseException):
    """SIGTERM arrived."""


@contextlib.contextmanager
def _terminated_by_signal() -> Iterator[None]:
    """Raise _Terminated on SIGTERM, wherever the main thread waits. Elsewhere signals are the caller's affair."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
