"""The evaluate stage beside training, as a Ray job of its own that judges each checkpoint (jobs/drivers/follow.py).

Training never waits for it and never ends with it: a follower that dies is started again, and what it had not judged by the end of
training is judged in the evaluate stage, which is the same job.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

from ray.job_submission import JobStatus, JobSubmissionClient

from pipeline.config.schema import RunConfig
from pipeline.storage import Storage
from pipeline.training.commits import committed
from pipeline.workflow.ray_jobs import StageJob, StageJobFailed, stop, submit_or_attach

LOOK_S = 5.0
STOP_S = 30.0


@contextlib.contextmanager
def followed(client: JobSubmissionClient, job: StageJob, config: RunConfig, storage: Storage) -> Iterator[None]:
    """Keep the follower at work from the first checkpoint on, while the block runs; afterwards it goes on by itself, unless the
    block ends in an error."""
    ended = threading.Event()
    running: list[str] = []
    thread = threading.Thread(
        target=_keep, args=(client, job, config, storage, ended, running), name="follower", daemon=True
    )
    thread.start()
    try:
        yield
    except BaseException:
        ended.set()
        if running:
            stop(client, running[-1], STOP_S)
        raise
    finally:
        ended.set()


def _keep(
    client: JobSubmissionClient,
    job: StageJob,
    config: RunConfig,
    storage: Storage,
    ended: threading.Event,
    running: list[str],
) -> None:
    """Submit, look, submit again after a failure. A refused configuration is not tried again."""
    failures, restarts = 0, config.cluster.max_failures
    while not committed(storage, config.run_id):
        if ended.wait(LOOK_S):
            return
    while not ended.is_set():
        try:
            running.append(submit_or_attach(client, job))
            print(f"evaluate  job {running[-1]} follows training", flush=True)
            code = _wait(client, running[-1], ended)
        except (StageJobFailed, RuntimeError, OSError) as error:  # the job server stays away; training notices itself
            print(f"evaluate  cannot follow ({error}); the evaluate stage does it later", file=sys.stderr, flush=True)
            return
        if code is None:
            return
        failures += 1
        if code == 2 or -1 < restarts < failures:
            print(f"evaluate  {running[-1]} ended ({code}); the evaluate stage goes on", file=sys.stderr, flush=True)
            return
        print(f"evaluate  {running[-1]} died ({code}) and is started again", file=sys.stderr, flush=True)


def _wait(client: JobSubmissionClient, submission_id: str, ended: threading.Event) -> int | None:
    """Until it ends: the exit code of one that failed; None of one that succeeded, or when nobody waits any more."""
    while not ended.wait(LOOK_S):
        info = client.get_job_info(submission_id)
        if info.status == JobStatus.SUCCEEDED:
            return None
        if info.status.is_terminal():
            return info.driver_exit_code or 1
    return None
