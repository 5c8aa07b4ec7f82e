"""Every stage as a job of its own on a Ray cluster, one after the other."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import sys
import time
from dataclasses import replace

from ray.job_submission import JobSubmissionClient

from data_prep.handed_listing import ENVIRONMENT, forget, hand_over
from jobs import stages
from jobs.commit import git_commit
from jobs.drivers.beside import followed
from jobs.drivers.failures import CLOSED, HELD, StageFailure
from jobs.on_ray.cluster import code_environment, connect, python
from jobs.on_ray.progress import ProgressLines, Work
from jobs.on_ray.signals import Interrupted, raise_on_signals
from jobs.stages import prepare
from jobs.stages.leases import refuse_held
from jobs.stages.records import Records
from pipeline.config.schema import RunConfig
from pipeline.manifest import digest_of
from pipeline.storage import Storage
from pipeline.workflow.duration import duration
from pipeline.workflow.heartbeat import Heartbeat
from pipeline.workflow.ray_jobs import PATIENCE_S, StageJob, StageJobFailed, follow, stop, submit_or_attach

STOP_S = 300  # for a stage that was asked to stop: the rest of a step and a checkpoint
OWN_PATIENCE_S = 20.0  # with a Ray of our own: its job server comes back never (on_ray/keeper.py)


def run_on_ray(todo: list[str], config: RunConfig, storage: Storage, records: Records) -> None:
    """`records`: whose list of the corpus, if they have one, counts for prepare. Raises StageFailure, and Interrupted on a signal."""
    address = os.environ.get("RAY_ADDRESS", "")
    elsewhere = address.startswith("http")  # a job server is all we need
    own = connect(config, todo, dashboard=True, job_name=f"{config.run_id} pipeline")
    if not address:  # on one cluster two drivers follow the same job; here is another one
        for stage in todo:
            refuse_held(stage, config, storage)
    with contextlib.nullcontext(address) if elsewhere else own as dashboard:
        raise_on_signals()
        token = os.environ.get("RAY_AUTH_TOKEN_PATH")
        print(f"Ray dashboard: {dashboard}" + (f" (asks for the token in {token})" if token else ""), flush=True)
        client = JobSubmissionClient(dashboard or None)
        for stage in todo:
            if stage == "evaluate" and stages.find(config, storage, stage).done(stage):  # by what followed training
                print(f"{stage:<9} done beside training", flush=True)
                continue
            beside = stage == "train" and "evaluate" in todo and config.evaluation.follow
            with (
                followed(client, _job("evaluate", config, storage), config, storage)
                if beside
                else contextlib.nullcontext()
            ):
                _run_to_its_end(client, stage, config, storage, records)


def _run_to_its_end(
    client: JobSubmissionClient, stage: str, config: RunConfig, storage: Storage, records: Records
) -> None:
    """A job that follows training and dies is started again, also when training is over; another stage's failure is the driver's."""
    follows = stage == "evaluate" and config.evaluation.follow
    for left in reversed(range(1 + max(config.cluster.max_failures, 0) if follows else 1)):
        try:
            _run_stage_job(client, stage, config, storage, records)
        except StageFailure as error:
            if error.exit_code != 1 or not left:
                raise
            print(f"{stage:<9} died and is started again: {error}", file=sys.stderr, flush=True)
        else:
            return


def _run_stage_job(
    client: JobSubmissionClient, stage: str, config: RunConfig, storage: Storage, records: Records
) -> None:
    """Submit or follow the stage's job, show its progress, and check that its record is there at the end."""
    job = _job(stage, config, storage)
    if stage == prepare.NAME and records.listings:
        told = {ENVIRONMENT: hand_over(config, storage, records.listings)}
        job = replace(job, runtime_env={**job.runtime_env, "env_vars": {**job.runtime_env["env_vars"], **told}})
    start = time.monotonic()
    submitting = f"{stage:<9} starting its Ray job"
    print(submitting, flush=True)
    with Heartbeat(submitting):
        submission_id = submit_or_attach(client, job)
    print(f"{stage:<9} job {submission_id}", flush=True)
    try:
        with ProgressLines(storage, config.run_id) as lines:
            lines.work = Work(stage, since=time.time())
            follow(client, submission_id, PATIENCE_S if os.environ.get("RAY_ADDRESS") else OWN_PATIENCE_S)
    except StageJobFailed as error:
        raise StageFailure(str(error), error.exit_code if error.exit_code in (2, HELD, CLOSED) else 1) from error
    except Interrupted:
        print(f"{stage:<9} is asked to stop, and training to commit a checkpoint; once more leaves at once", flush=True)
        with Heartbeat(f"{stage:<9} stopping"):
            stop(client, submission_id, patience_s=STOP_S)
        raise
    if not stages.finished(stage, config, storage):
        raise StageFailure(f"{submission_id} SUCCEEDED, but the stage's record is not in {storage.uri()}", 1)
    if stage == prepare.NAME:
        forget(config, storage)
        if (dataset := stages.find(config, storage, "train").dataset) is not None:
            print(prepare.outcome(dataset), flush=True)
    print(f"{stage:<9} done in {duration(time.monotonic() - start)}", flush=True)


def _job(stage: str, config: RunConfig, storage: Storage) -> StageJob:
    # The stage reads the run's own copy of the configuration: what it works on cannot change between the stages.
    settings = digest_of(config)
    follow = " --follow" if stage == "evaluate" and config.evaluation.follow else ""
    command = f"{python()} -m jobs.{stage}{follow} --config {_quoted(storage, config)} {_overrides(config)}".strip()
    return StageJob(
        name=f"{config.run_id}-{stage}-{settings[:6]}{hashlib.sha256(storage.root.encode()).hexdigest()[:4]}",
        entrypoint=command,
        metadata={
            "job_name": f"{config.run_id} {stage}",
            "run_id": config.run_id,
            "stage": stage,
            "storage_root": storage.root,
            "config_digest": settings[:16],
            "git_commit": git_commit(),
        },
        runtime_env=code_environment(stop_wait_s=STOP_S),
    )


def _quoted(storage: Storage, config: RunConfig) -> str:
    return shlex.quote(storage.uri(f"runs/{config.run_id}/config.yaml"))


def _overrides(config: RunConfig) -> str:
    """How a stage reaches the storage that holds the rest of its configuration."""
    where = config.storage
    pairs = [("endpoint_url", where.endpoint_url), ("region", where.region)] if where.is_s3 else []
    return " ".join(shlex.quote(f"storage.{name}={value}") for name, value in pairs if value)
