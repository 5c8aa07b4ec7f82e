"""Training on Ray: a group of workers that call the training core.

Ray starts the group and starts it again when a worker dies. Nothing else is asked of it: checkpoints go straight from the ranks to storage and commit by their own manifest, so a restarted group simply
calls `train` again, which continues from the newest one. `ray.train.report` is called once per committed checkpoint, on
all ranks, for the dashboard; it carries no files, hence Ray's snapshot and our retention cannot disagree.

What a restart cannot cure is found before the start (wrong data, a foreign checkpoint) or returned by the worker rather
than raised (a run that diverges, is somebody else's or was asked to stop): raising would restart the group `cluster.max_failures` times. Whether the run is complete is read from storage by the driver.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray.train
from ray.train.torch import get_device

from jobs.on_ray.elastic import Pause
from jobs.on_ray.failed import WorkersFailed
from jobs.on_ray.group import run_in_group
from jobs.on_ray.signals import Interrupted
from jobs.on_ray.stop import StopFlag, listening, run_until_signal
from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.dataset.order import check_demand
from pipeline.file_index import read_dataset
from pipeline.integrity import read_record
from pipeline.lease import Held, LeaseLost
from pipeline.manifest import CheckpointManifest, DatasetManifest, TrainManifest
from pipeline.storage import Storage, open_storage
from pipeline.training.commits import RunFacts, committed_steps, continue_from, train_folder
from pipeline.training.left_out import order_of, read_left_out
from pipeline.training.metrics import TrainProgress
from pipeline.workflow.record import add_event

Report = Callable[[TrainProgress], None]


class TrainingFailed(WorkersFailed):
    """Training ended without a complete run; the message says why."""


def train_with_ray(config: RunConfig, dataset: DatasetManifest, storage: Storage, report: Report) -> TrainManifest:
    """Train the run to its end on the connected Ray cluster. `report` is called in the worker of rank 0.

    Raises ValueError for wrong input; Held and LeaseLost if the run is somebody else's; Interrupted on SIGINT and SIGTERM, after
    a checkpoint; TrainingFailed, and WorkersFailed after `cluster.max_failures` restarts.
    """
    check_demand(config, dataset)
    order = order_of(config, dataset, read_left_out(storage, config.run_id).ranges)
    continue_from(storage, RunFacts.of(config, dataset, order), order)  # refuses a foreign run before anything starts
    config = config.model_copy(update={"storage": storage.config.model_copy(update={"root": storage.root})})  # absolute
    folder = train_folder(config.run_id)
    flag = StopFlag()
    pause = None if config.parallelism.elastic is None else Pause()
    group = partial(
        run_in_group,
        config,
        storage,
        _worker,
        name=config.run_id,
        folder=f"{folder}/ray",
        pause=pause,
        config_values=config.model_dump(mode="json"),
        dataset={"identity": dataset.identity, "digest": dataset.digest},
        report=report,
        flag=flag,
        growing=pause,
        owner=uuid.uuid4().hex,
    )
    refusal, number = run_until_signal(group, flag)
    if isinstance(refusal, Held | LeaseLost):
        raise refusal
    if isinstance(refusal, Stopped):
        print(refusal.message, flush=True)
        raise Interrupted(number or signal.SIGTERM)
    if isinstance(refusal, str):
        raise TrainingFailed(refusal)
    found = read_record(storage, f"{folder}/manifest.json", TrainManifest)
    if found is None:
        raise TrainingFailed(f"the workers ended, but {storage.uri(folder)}/manifest.json is not there")
    return found


@dataclass(frozen=True)
class Stopped:
    """Workers committed a checkpoint and left, as they were asked to."""

    message: str


def _worker(arguments: dict[str, Any]) -> str | Stopped | Held | LeaseLost | None:
    """One rank. Returns why the run cannot go on, or None."""
    import torch

    from pipeline.training.guard import RunDiverged
    from pipeline.training.trainer import TrainingStopped, train

    config = validate(arguments["config_values"])
    storage = open_storage(config.storage)
    if config.cluster.use_gpu:
        torch.cuda.set_device(get_device())  # Ray shows every worker all GPUs of its node
    else:
        torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    notice = PreemptionNotice(every=config.training.log_every)
    report, flag, growing = arguments["report"], arguments["flag"], arguments["growing"]
    asked: AbstractContextManager[threading.Event] = contextlib.nullcontext(threading.Event())
    paused = asked
    if ray.train.get_context().get_world_rank() == 0:
        asked = listening(flag)
        if growing is not None:
            paused = listening(growing)
            note_size(config, storage, ray.train.get_context().get_world_size())
    try:
        with asked as stop, paused as pause:
            train(
                config,
                read_dataset(storage, **arguments["dataset"]),
                storage,
                report=report,
                on_checkpoint=_report_checkpoint,
                should_stop=lambda: notice() or stop.is_set() or pause.is_set(),
                owner=arguments["owner"],
            )
    except RunDiverged as error:
        return str(error)
    except (Held, LeaseLost) as error:
        return error
    except TrainingStopped as stopped:
        if flag.asked():
            return Stopped(str(stopped))
        if growing is not None and growing.asked():
            growing.note_saved()
        notice.wait_for_the_end()
        raise
    return None


def note_size(config: RunConfig, storage: Storage, workers: int) -> None:
    """Tell people and the run's events how many workers an elastic run has now."""
    mesh = config.at_size(workers).parallelism
    shape = f"replicate {mesh.replicate}, shard {mesh.shard}, ep {mesh.ep}"
    print(f"train     on {workers} of at most {config.sizes[-1]} workers: {shape}", flush=True)
    step = max(committed_steps(storage, config.run_id), default=0)
    add_event(storage, config.run_id, "sized", "train", workers=workers, most=config.sizes[-1], step=step)


def _report_checkpoint(manifest: CheckpointManifest) -> None:
    ray.train.report({"step": manifest.step, "tokens_seen": manifest.tokens_seen, "loss": manifest.loss})


class PreemptionNotice:
    """`should_stop` for nodes that are about to go: asked every step, asks Ray every `every`-th (a barrier of all ranks)."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._asked = 0
        self._deadline = 0.0  # UNIX time

    def __call__(self) -> bool:
        self._asked += 1
        if self._asked % self._every:
            return False
        info = ray.train.get_preemption_info()
        if info is None:
            return False
        self._deadline = info.deadline_ms / 1000 if info.deadline_ms else time.time() + 120
        return True

    def wait_for_the_end(self) -> None:
        """With the checkpoint safe, wait for Ray to take the group down: a preemption is no failure of the run."""
        threading.Event().wait(max(0.0, self._deadline - time.time()) + 60)
