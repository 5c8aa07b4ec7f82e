"""`jobs.evaluate`: the chosen checkpoint as a stage, or on Ray one checkpoint of the run after the other.

python -m jobs.evaluate --config ...             the one that `evaluation.checkpoint` means, once the run is trained
python -m jobs.evaluate --follow --config ...    each as it is committed, beside training, until the run is trained and judged
python -m jobs.evaluate --all --config ...       each that is there now
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from jobs import stage, stages
from jobs.cli import looking, open_run, parser
from jobs.drivers.ending import ENDINGS, ended
from jobs.on_ray.signals import raise_on_signals
from jobs.stages.records import hold_dataset
from jobs.views.curves import write_curves
from jobs.views.live import watched
from pipeline.config.schema import RunConfig
from pipeline.evaluation.follow import Followed, follow
from pipeline.evaluation.result import EvaluationProgress
from pipeline.manifest import CheckpointManifest, DatasetManifest, EvaluationManifest
from pipeline.storage import Storage
from pipeline.training.commits import lease_path, train_folder
from pipeline.workflow.record import add_event

POLL_S = 5.0
QUIET_S = 3600.0


def command(arguments: Sequence[str] | None) -> int:
    """`jobs.evaluate`. Returns the exit code."""
    made = parser("evaluate", stages.room("evaluate").SUMMARY)
    add_options(made)
    return run(made.parse_args(arguments))


def add_options(made: argparse.ArgumentParser) -> None:
    which = made.add_mutually_exclusive_group()
    which.add_argument("--follow", action="store_true", help="every checkpoint as it is committed, beside training")
    which.add_argument("--all", action="store_true", help="every checkpoint that is there now")


def run(given: argparse.Namespace) -> int:
    """Do what is asked for. Returns the exit code."""
    if given.follow or given.all:
        return judge_all(given.config, given.overrides, wait=given.follow)
    return stage.main("evaluate", ["--config", given.config, *given.overrides])


def judge_all(config_name: str, overrides: Sequence[str], *, wait: bool) -> int:
    """Judge what is there; with `wait` until the run is trained. Returns the exit code: 1 if a checkpoint could not be judged."""
    try:
        with looking(config_name):
            config, storage = open_run(config_name, overrides)
            storage.check_writable()
            records = stages.find(config, storage, "evaluate", until="train")
            stages.require_inputs("train", records)
            assert records.dataset is not None
            hold_dataset(config, storage, records.dataset)
            stages.room("evaluate").check(config, storage, records, here=True)
            from jobs.on_ray.cluster import connect
        with connect(config), watched("evaluate", storage, config.run_id):
            raise_on_signals()
            done = _follow(config, records.dataset, storage, wait)
            if wait and stages.find(config, storage, "evaluate", until="train").done("train"):
                stages.run("evaluate", config, storage)  # the chosen one, if it is the mean of several
    except ENDINGS as error:
        return ended("evaluate", error)
    print(_summary(done), flush=True)
    return 1 if done.passed_over else 0


def _follow(config: RunConfig, dataset: DatasetManifest, storage: Storage, wait: bool) -> Followed:
    from jobs.on_ray.evaluate import evaluate_with_ray  # here: it brings Ray
    from jobs.on_ray.task import beside_training

    place = beside_training()

    def judge(checkpoint: CheckpointManifest, with_tasks: bool) -> EvaluationManifest:
        start = time.monotonic()
        trained = storage.exists(f"{train_folder(config.run_id)}/manifest.json")
        report = (
            stages.reporter("evaluate", config) if trained else _quiet
        )  # progress.json is training's while it is at work
        found = evaluate_with_ray(
            config,
            dataset,
            checkpoint,
            storage,
            report,
            with_tasks=with_tasks,
            place=None if trained or not wait else place,
        )
        seconds = round(time.monotonic() - start, 3)
        loss = found.overall.loss
        add_event(storage, config.run_id, "judged", "evaluate", step=found.step, loss=loss, took=seconds)
        write_curves(storage, config.run_id)
        return found

    again = Patience(storage, config.run_id) if wait else lambda: False
    return follow(config, dataset, storage, judge=judge, wait=again, say=lambda line: print(line, flush=True))


class Patience:
    """Look again in a moment, unless nobody has trained the run for an hour: then the hardware is for others."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        self._storage, self._path = storage, lease_path(run_id)
        self._seen: bytes | None = None  # the trainer's lease, which beats
        self._since = time.monotonic()

    def __call__(self) -> bool:
        now = self._storage.read_or_none(self._path)
        if now != self._seen:
            self._seen, self._since = now, time.monotonic()
        if time.monotonic() - self._since > QUIET_S:
            print(
                f"nobody has trained the run for {QUIET_S / 60:.0f} minutes; follow it again when it goes on",
                flush=True,
            )
            return False
        time.sleep(POLL_S)
        return True


def _quiet(at: EvaluationProgress) -> None:
    """Says nothing."""


def _summary(done: Followed) -> str:
    parts = [f"{len(done.judged):,} checkpoints judged"]
    if done.passed_over:
        parts.append(f"{len(done.passed_over)} passed over as damaged: {', '.join(map(str, sorted(done.passed_over)))}")
    if done.missing:
        parts.append(
            f"no result of steps {', '.join(map(str, done.missing))}, whose checkpoints are gone (evaluation.waiting, checkpoint.keep)"
        )
    return "evaluate: " + "; ".join(parts)
