"""From raw text to a published model: the four stages as follow-on Ray jobs, each done once.

    python -m jobs.pipeline --config debug                                  everything on this machine
    ray job submit --working-dir . -- python -m jobs.pipeline --config ...  on the cluster of RAY_ADDRESS
    python -m jobs.pipeline --backend kuberay --config ...                  one KubeRay RayJob a stage

What is already done is read from storage first: a finished run costs seconds and no cluster. Kill anything at any moment and
run the same command again. The exit code is the truth: 0 only if the model is published; 2 for wrong configuration or input.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from jobs import stages
from jobs.cli import open_run, parser
from jobs.cluster import code_environment, connect, in_a_ray_job, python
from jobs.progress import ProgressLines, Work
from jobs.summary import print_summary
from pipeline.config.load import ConfigError, dump_yaml
from pipeline.config.schema import RunConfig
from pipeline.manifest import digest_of
from pipeline.storage import Storage
from pipeline.training import initial
from pipeline.workflow.record import STAGES, duration

KUBERAY = """
--backend kuberay makes one RayJob a stage, <run_id>-<stage>-<attempt>, from the template of that stage, in the cluster of KUBECONFIG or of
the pod that this runs in. It can be killed and started again at any time, anywhere: it finds the RayJob and goes on watching.

  MOONLIGHT_NAMESPACE      where templates and queues are (moonlight)
  MOONLIGHT_PRIORITY       a WorkloadPriorityClass: moonlight-interactive, -scheduled or -release (moonlight-interactive)
  MOONLIGHT_ATTEMPTS       RayJobs that one call may make of a stage, each with retries of its own (1)
  MOONLIGHT_ON_TERMINATE   on SIGTERM: detach leaves the RayJob running, cancel deletes it (detach)

Its exit codes: 0 done  2 wrong configuration, or template, queue or operator missing  10 the stage's program failed
  11 a deadline passed  12 KubeRay lost the job, or the API server or the storage stayed away  13 the RayJob was refused
  14 stopped  15 deleted  16 success without a manifest  17 Kueue gave up  143 SIGTERM, the job goes on
  (docs/kubernetes.md, "Troubleshooting")"""


class Interrupted(BaseException):
    """SIGINT or SIGTERM; carries the signal's number."""


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser("pipeline", "Run prepare, train, evaluate and publish; what is done already is not done again.")
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.epilog = f"{textwrap.fill(made.epilog or '', 110)}\n{KUBERAY}"
    made.add_argument(
        "--backend",
        choices=["ray", "kuberay"],
        default="ray",
        help="ray: jobs of the Ray cluster at RAY_ADDRESS or of a local one; kuberay: RayJobs, see below",
    )
    made.add_argument("--only", choices=STAGES, help="this stage alone (its inputs must be there)")
    given = made.parse_args(arguments)
    try:
        config, storage = _open(given)
        if given.backend == "kuberay":
            from jobs.kuberay import run_on_kuberay

            return run_on_kuberay(config, storage, given)
        records = stages.find(config, storage, given.only or "prepare")
        stages.hold_dataset(config, storage, records)
        todo = [stage for stage in _wanted(given) if not _report_done(stage, records)]
        if todo:
            stages.require_inputs(todo[0], config, storage, records)
            _run_on_ray(todo, config, storage)
            records = stages.find(config, storage)
        if not given.only:
            print_summary(config, storage, records, given.config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StageFailure as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as error:
        number = int(error.args[0])
        print(f"stopped by {signal.Signals(number).name}; run the same command to go on", file=sys.stderr)
        return 128 + number
    return 0


class StageFailure(Exception):
    """A stage did not succeed; `exit_code` is the pipeline's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def _open(given: argparse.Namespace) -> tuple[RunConfig, Storage]:
    """Everything that can be wrong is found here, before anything starts. Raises ValueError with one line."""
    if in_a_ray_job():
        _refuse_relative_root(given)
    config, storage = open_run(given.config, given.overrides)
    storage.check_writable()
    if given.only in (None, "prepare", "train"):
        config = initial.pin(config, storage)
    if given.only in (None, "prepare") and stages.held_dataset(config, storage) is None:
        from data_prep.listing import list_source

        listings = {
            source.name: list_source(source, index, config.storage)
            for index, source in enumerate(config.corpus.sources)
        }
        stages.check_supply(config, listings)
        stages.check_tokenizer(config, storage, listings)
    if config.evaluation.tasks and given.only in (None, "evaluate"):
        here = given.backend == "ray" and not os.environ.get("RAY_ADDRESS", "").startswith("http")
        stages.check_tasks(config, stages.find(config, storage, given.only or "prepare"), data=here)
    answer = initial.answer_of(config.run_id, storage)
    if answer is not None and answer.initial_weights == config.training.initial_weights:
        weights = answer.initial_weights or "drawn weights: nothing was promoted when it began"
        print(f"{config.run_id} starts from {weights}", flush=True)
    storage.write(f"runs/{config.run_id}/config.yaml", dump_yaml(config).encode())
    return config, storage


def _refuse_relative_root(given: argparse.Namespace) -> None:
    from pipeline.config.load import load_config

    root = load_config(given.config, given.overrides).storage.root
    if "://" not in root and not os.path.isabs(os.path.expanduser(root)):
        raise ConfigError(
            f"storage.root {root!r} is relative, but a Ray job runs in a folder that is deleted with it; "
            "give an absolute path or s3://bucket/prefix"
        )


def _wanted(given: argparse.Namespace) -> list[str]:
    return [given.only] if given.only else list(STAGES)


def _report_done(stage: str, records: stages.Records) -> bool:
    done = records.done(stage)
    if done:
        print(f"{stage:<9} up to date", flush=True)
    return done


def _run_on_ray(todo: list[str], config: RunConfig, storage: Storage) -> None:
    from ray.job_submission import JobSubmissionClient

    _raise_on_signals()
    address = os.environ.get("RAY_ADDRESS", "")
    elsewhere = address.startswith("http")  # a job server is all we need
    own = connect(config, dashboard=True, job_name=f"{config.run_id} pipeline")
    with contextlib.nullcontext(address) if elsewhere else own as dashboard:
        print(f"Ray dashboard: {dashboard}", flush=True)
        client = JobSubmissionClient(dashboard or None)
        for stage in todo:
            _run_stage_job(client, stage, config, storage)


def _run_stage_job(client: Any, stage: str, config: RunConfig, storage: Storage) -> None:
    """Submit or follow the stage's job, show its progress, and check that its record is there at the end."""
    from pipeline.workflow.ray_jobs import StageJob, StageJobFailed, follow, submit_or_attach

    # The stage reads the run's own copy of the configuration: what it works on cannot change between the stages.
    settings = digest_of(config)
    command = f"{python()} -m jobs.{stage} --config {_quoted(storage, config)} {_overrides(config)}".strip()
    job = StageJob(
        name=f"{config.run_id}-{stage}-{settings[:6]}{hashlib.sha256(storage.root.encode()).hexdigest()[:4]}",
        entrypoint=command,
        metadata={
            "job_name": f"{config.run_id} {stage}",
            "run_id": config.run_id,
            "stage": stage,
            "storage_root": storage.root,
            "config_digest": settings[:16],
            "git_commit": stages.git_commit(),
        },
        runtime_env=code_environment(),
    )
    start = time.monotonic()
    submission_id = submit_or_attach(client, job)
    print(f"{stage:<9} job {submission_id}", flush=True)
    try:
        with ProgressLines(storage, config.run_id) as lines:
            lines.work = Work(stage, since=time.time())
            follow(client, submission_id)
    except StageJobFailed as error:
        raise StageFailure(str(error), 2 if error.exit_code == 2 else 1) from error
    except Interrupted:
        client.stop_job(submission_id)
        raise
    if not stages.finished(stage, config, storage):
        raise StageFailure(f"{submission_id} SUCCEEDED, but the stage's record is not in {storage.uri()}", 1)
    print(f"{stage:<9} done in {duration(time.monotonic() - start)}", flush=True)


def _quoted(storage: Storage, config: RunConfig) -> str:
    return shlex.quote(storage.uri(f"runs/{config.run_id}/config.yaml"))


def _overrides(config: RunConfig) -> str:
    """How a stage reaches the storage that holds the rest of its configuration."""
    where = config.storage
    pairs = [("endpoint_url", where.endpoint_url), ("region", where.region)] if where.is_s3 else []
    return " ".join(shlex.quote(f"storage.{name}={value}") for name, value in pairs if value)


def _raise_on_signals() -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


if __name__ == "__main__":
    sys.exit(main())
