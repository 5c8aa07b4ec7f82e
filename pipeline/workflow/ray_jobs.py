"""Stages as Ray jobs: submit one, follow it to its end, tell the truth about how it ended.

The submission id is a function of (run, stage, what it works on, attempt), so of two drivers one submits and the other
follows. A job's status is asked of the job server again and again; its log stream is never trusted with the verdict, because
`ray job submit` and `logs --follow` end with 0 for stopped jobs and dropped connections. STOPPED is not success.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient

POLL_S = 1.0
PATIENCE_S = 120.0  # how long the job server may stay away
SILENCE_S = 20.0  # of a job server while a job is being stopped


class StageJobFailed(Exception):
    """A stage job that did not succeed. `exit_code` is its driver's (1 when there was none); the message has its last lines."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class StageJob:
    """What to submit. `name` without the attempt is the identity of the work."""

    name: str  # e.g. debug-train-1a2b3c
    entrypoint: str
    metadata: Mapping[str, str]  # job_name is what the dashboard's list shows
    runtime_env: Mapping[str, Any]


def submit_or_attach(client: JobSubmissionClient, job: StageJob) -> str:
    """The submission id of the job's unfinished attempt, or of a new one after every earlier attempt has ended.

    A job server that is just starting, or gone for a moment, is asked again for `PATIENCE_S`.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            attempts = {info.submission_id: info.status for info in client.list_jobs() if info.submission_id}
            submission_id, status = _newest_attempt(job.name, attempts)
            if status is None:
                client.submit_job(
                    entrypoint=job.entrypoint,
                    submission_id=submission_id,
                    metadata=dict(job.metadata),
                    runtime_env=dict(job.runtime_env),
                )
            return submission_id
        except (RuntimeError, OSError) as error:  # also: somebody submitted the same id a moment ago
            if time.monotonic() > deadline:
                raise StageJobFailed(f"{job.name} could not be submitted: {error}", 1) from error
            time.sleep(POLL_S)


def _newest_attempt(name: str, attempts: Mapping[str, JobStatus]) -> tuple[str, JobStatus | None]:
    """The attempt that is unfinished, or the first unused id (with None)."""
    for attempt in itertools.count(1):
        submission_id = f"{name}-{attempt}"
        status = attempts.get(submission_id)
        if status is None or not status.is_terminal():
            return submission_id, status
    raise AssertionError


def stop(client: JobSubmissionClient, submission_id: str, patience_s: float, silence_s: float = SILENCE_S) -> None:
    """Ask the job to stop and wait for its end, but not for ever: a job server that is going down answers nobody. One that did not
    answer once is asked again for `silence_s`, since who gives up may end the Ray in which a checkpoint is being written."""

    def ask() -> None:
        asked, last_answer = False, time.monotonic()
        while True:
            try:
                asked = asked or client.stop_job(submission_id) is not None
                if client.get_job_status(submission_id).is_terminal():
                    return
                last_answer = time.monotonic()
            except (RuntimeError, OSError) as error:
                if time.monotonic() - last_answer > silence_s:
                    said = " ".join(str(error).split())[:200]
                    what = f"{submission_id}: the job server does not say how it ended ({said})"
                    print(what, file=sys.stderr, flush=True)
                    return
            time.sleep(POLL_S)

    asking = threading.Thread(target=ask, name="stop-job", daemon=True)
    asking.start()
    asking.join(patience_s)


def follow(client: JobSubmissionClient, submission_id: str, patience_s: float = PATIENCE_S) -> None:
    """Wait for the end. Returns on SUCCEEDED; raises StageJobFailed on FAILED, STOPPED, or a job server that stays away for
    `patience_s`."""
    last_answer = time.monotonic()
    while True:
        try:
            info = client.get_job_info(submission_id)
            last_answer = time.monotonic()
        except (RuntimeError, OSError) as error:
            if time.monotonic() - last_answer > patience_s:
                raise StageJobFailed(
                    f"{submission_id}: the job server has not answered for {patience_s:.0f} s ({error}); "
                    "run the same command again to go on",
                    1,
                ) from error
            time.sleep(POLL_S)
            continue
        if info.status == JobStatus.SUCCEEDED:
            return
        if info.status.is_terminal():
            raise StageJobFailed(
                f"{submission_id} {info.status.value}{_tail(client, submission_id)}", info.driver_exit_code or 1
            )
        time.sleep(POLL_S)


def _tail(client: JobSubmissionClient, submission_id: str, lines: int = 15) -> str:
    try:
        log = client.get_job_logs(submission_id).strip().splitlines()
    except (RuntimeError, OSError) as error:
        return f" (its log cannot be read: {error})"
    return "; its last lines:\n" + "\n".join(f"  | {line}" for line in log[-lines:]) if log else ""
