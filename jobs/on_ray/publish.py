"""Publishing on Ray: one task that writes the Hugging Face folder and moves the pointer."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from jobs.on_ray.task import run_in_task, wants_gpu
from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.lease import hold, say_waiting
from pipeline.manifest import CheckpointManifest, DatasetManifest, EvaluationManifest, ModelManifest, TrainManifest
from pipeline.publishing.version import PublishProgress, lease_path
from pipeline.storage import open_storage

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
    train, evaluation, dataset, checkpoint = records
    path, what = lease_path(config.run_id), f"the model of run {config.run_id}"
    with hold(storage, path, what=what, owner=owner, waiting=say_waiting) as lease:
        return publish(
            config,
            TrainManifest.model_validate_json(train),
            EvaluationManifest.model_validate_json(evaluation),
            DatasetManifest.model_validate_json(dataset),
            storage,
            report=report,
            checkpoint=CheckpointManifest.model_validate_json(checkpoint),
            git_commit=git_commit,
            check=lease.check,
        ).model_dump_json()
