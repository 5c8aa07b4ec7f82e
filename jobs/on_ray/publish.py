"""Publishing on Ray: a task that makes the Hugging Face folder and moves the pointer, and tasks that write its weight files.

A task writes one file in blocks, so what a worker holds does not depend on the model. Which file has
which bytes was settled before (layout.py): any number of workers, killed and started again, leave the same folder.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import ray

from jobs.on_ray.task import result_of, run_in_task, wants_gpu
from pipeline.config.load import validate
from pipeline.config.schema import RunConfig, StorageConfig
from pipeline.lease import hold, say_waiting
from pipeline.manifest import CheckpointManifest, DatasetManifest, EvaluationManifest, ModelManifest, TrainManifest
from pipeline.publishing import targets
from pipeline.publishing.version import PublishProgress, lease_path
from pipeline.storage import Storage, open_storage

if TYPE_CHECKING:
    from pipeline.publishing.layout import WeightFile
    from pipeline.publishing.weights import Written

Report = Callable[[PublishProgress], None]


def publish_with_ray(
    config: RunConfig,
    train: TrainManifest,
    evaluation: EvaluationManifest,
    dataset: DatasetManifest,
    *,
    checkpoint: CheckpointManifest | None = None,
    git_commit: str = "unknown",
    report: Report,
) -> ModelManifest:
    """Publish on the connected Ray cluster. `report` is called in the task.

    Raises GateError and ValueError as `pipeline.publishing.export.publish` does, Held if somebody else publishes the run, LeaseLost
    if somebody has taken over, and Ray's error for anything else.
    """
    owner = uuid.uuid4().hex  # a task that Ray starts again takes over from its dead self
    records = [record.model_dump_json() for record in (train, evaluation, dataset, checkpoint or train.checkpoint)]
    gpus = wants_gpu(config.cluster) if config.publishing.sample_prompts else 0
    published = run_in_task(
        config, "publish", _publish, config.model_dump(mode="json"), records, git_commit, report, owner, gpus=gpus
    )
    return ModelManifest.model_validate_json(published)


def _publish(config_values: dict[str, Any], records: list[str], git_commit: str, report: Report, owner: str) -> str:
    from pipeline.publishing.export import publish

    config = validate(config_values)
    storage = open_storage(config.storage)
    train = TrainManifest.model_validate_json(records[0])
    evaluation = EvaluationManifest.model_validate_json(records[1])
    dataset = DatasetManifest.model_validate_json(records[2])
    checkpoint = CheckpointManifest.model_validate_json(records[3])
    unjudged = config.publishing.model_copy(update={"promote": False, "max_loss": None, "gates": ()})
    quiet = config.model_copy(update={"publishing": unjudged})
    path, what = lease_path(config.run_id), f"the model of run {config.run_id}"
    with hold(storage, path, what=what, owner=owner, waiting=say_waiting) as lease:
        options: dict[str, Any] = {"report": report, "git_commit": git_commit, "write_files": write_files}
        options["check"] = lease.check
        model = publish(config, train, evaluation, dataset, storage, checkpoint=checkpoint, **options)
        models = [model]
        for other, scores in targets.others(config, dataset, checkpoint, storage):
            models.append(publish(quiet, train, scores, dataset, storage, checkpoint=other, **options))
        for each in models:
            for revision in targets.unpushed(config, each, storage):
                lease.check()
                _push(config, storage, each, revision, report)
    return model.model_dump_json()


def _push(config: RunConfig, storage: Storage, model: ModelManifest, revision: str, report: Report) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from pipeline.publishing.hub import push

    hub = config.publishing.hub
    assert hub.repo is not None
    report(PublishProgress(f"{hub.repo}, revision {revision}", 0, 0))
    disable_progress_bars()
    main = revision == targets.MAIN
    push(
        HfApi(endpoint=os.environ.get("HF_ENDPOINT")),  # token: HF_TOKEN, or the one that `hf auth login` left
        storage,
        model,
        hub.repo,
        revision,
        private=hub.private,
        tag=hub.revisions == "tags" and not main,
        wanted=(lambda: targets.is_promoted(model, storage)) if main else (lambda: True),
    )


def write_files(config: RunConfig, checkpoint: CheckpointManifest, folder: str) -> Iterator[Written]:
    """The weight files of a checkpoint, as they are done; `publishing.workers` tasks at a time."""
    from pipeline.publishing.layout import plan_files  # here and below: the driver needs no torch

    write = ray.remote(_write_file).options(
        name="publish-weights", num_cpus=config.cluster.cpus_per_worker, max_retries=config.cluster.max_failures
    )
    start = partial(write.remote, ray.put(config.storage.model_dump(mode="json")), checkpoint.model_dump_json(), folder)
    left = iter(plan_files(config))
    running = [start(file) for file in islice(left, config.publishing.workers or config.parallelism.world_size)]
    while running:
        (done,), running = ray.wait(running)
        running += [start(file) for file in islice(left, 1)]
        yield result_of(done)


def _write_file(storage_values: dict[str, Any], checkpoint: str, folder: str, file: WeightFile) -> Written:
    import torch

    from pipeline.publishing.weights import write_file
    from pipeline.training.files import CheckpointReader

    torch.set_num_threads(1)
    storage = open_storage(StorageConfig.model_validate(storage_values))
    reader = CheckpointReader(storage, CheckpointManifest.model_validate_json(checkpoint))
    return write_file(file, reader, storage, folder)
