"""From the command line of `jobs.pipeline` to its exit code: what can be wrong first, then the stages that are not done."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from botocore.exceptions import BotoCoreError

from jobs import stages
from jobs.cli import looking, open_run, parser
from jobs.commit import git_commit
from jobs.drivers.failures import CLOSED, HELD, StageFailure
from jobs.drivers.options import add_options
from jobs.on_ray.cluster import in_a_ray_job
from jobs.on_ray.demand import check_cluster
from jobs.on_ray.signals import Interrupted
from jobs.stages.records import Records, hold_dataset, keep_settings
from jobs.views.live import write_last_page
from jobs.views.summary import print_summary
from pipeline.config.load import ConfigError, load_config
from pipeline.config.schema import RunConfig
from pipeline.lease import Held, person
from pipeline.publishing.gate import GateError
from pipeline.report.page import report_path
from pipeline.storage import Storage, said_by_storage
from pipeline.training import initial
from pipeline.workflow.record import add_event


def command(arguments: Sequence[str] | None) -> int:
    """`jobs.pipeline`. Returns the exit code."""
    of = ", ".join(stages.names())
    made = parser("pipeline", f"Run the stages of a run ({of}); what is done already is not done again.")
    add_options(made)
    return run(made.parse_args(arguments))


def run(given: argparse.Namespace) -> int:
    """Run what is wanted and not done. Returns the exit code."""
    try:
        with looking(given.config):
            config, storage, records = _open(given)
        missing = [stage for stage in _wanted(given) if not records.done(stage)]
        if missing:
            add_event(storage, config.run_id, "asked", missing[0], by=person(), commit=git_commit())
        if given.backend == "kuberay":
            from jobs.drivers.kuberay import run_on_kuberay

            return run_on_kuberay(config, storage, given, records)
        hold_dataset(config, storage, records.dataset)
        todo = [stage for stage in _wanted(given) if not _report_done(stage, storage, records)]
        if todo:
            from jobs.drivers.ray_jobs import run_on_ray

            print(f"the run's page: {storage.uri(report_path(config.run_id))}", flush=True)
            try:
                run_on_ray(todo, config, storage, records)
            finally:
                write_last_page(storage, config.run_id)
            records = stages.find(config, storage)
        if not given.only:
            print_summary(config, storage, records, given)
    except GateError as error:
        print(f"error: {error}", file=sys.stderr)
        return CLOSED
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, BotoCoreError) as error:
        print(f"error: {said_by_storage(error)}", file=sys.stderr)
        return 1
    except StageFailure as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Held as error:
        print(f"error: {error}", file=sys.stderr)
        return HELD
    except Interrupted as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _open(given: argparse.Namespace) -> tuple[RunConfig, Storage, Records]:
    """Everything that can be wrong is found here, before anything starts. Raises ValueError with one line."""
    if in_a_ray_job():
        _refuse_relative_root(given)
    config, storage = open_run(given.config, given.overrides)
    storage.check_writable()
    if given.only == "follow" and given.backend != "kuberay":
        raise ConfigError("--only follow belongs to --backend kuberay; elsewhere run python -m jobs.evaluate --follow")
    if given.only in (None, "prepare", "train"):
        config = initial.pin(config, storage)
    records = stages.find(config, storage, "train" if given.only == "follow" else given.only or "prepare")
    here = given.backend == "ray" and not os.environ.get("RAY_ADDRESS", "").startswith("http")
    stages.check(_wanted(given), config, storage, records, here=here)
    todo = [stage for stage in _wanted(given) if not records.done(stage)]
    if todo and given.backend == "ray":
        check_cluster(config, todo)
    answer = initial.answer_of(config.run_id, storage)
    if answer is not None and answer.initial_weights == config.training.initial_weights:
        weights = answer.initial_weights or "drawn weights: nothing was promoted when it began"
        print(f"{config.run_id} starts from {weights}", flush=True)
    keep_settings(config, storage)
    return config, storage, records


def _refuse_relative_root(given: argparse.Namespace) -> None:
    root = load_config(given.config, given.overrides).storage.root
    if "://" not in root and not os.path.isabs(os.path.expanduser(root)):
        raise ConfigError(
            f"storage.root {root!r} is relative, but a Ray job runs in a folder that is deleted with it; "
            "give an absolute path or s3://bucket/prefix"
        )


def _wanted(given: argparse.Namespace) -> list[str]:
    if given.only == "follow":  # waits for what it follows
        return []
    return [given.only] if given.only else stages.names()


def _report_done(stage: str, storage: Storage, records: Records) -> bool:
    done = records.done(stage)
    if done:
        stages.confirm(stage, storage, records)
        print(f"{stage:<9} up to date", flush=True)
    return done
