"""Evaluation on Ray: one task that scores the whole network, or with GPUs the group of workers that trained it.

A result that is already committed is found before Ray is asked for anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jobs.on_ray.task import run_in_task, wants_gpu
from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.evaluation.result import EvaluationProgress, committed
from pipeline.manifest import CheckpointManifest, DatasetManifest, EvaluationManifest
from pipeline.storage import Storage, open_storage

Report = Callable[[EvaluationProgress], None]


def evaluate_with_ray(
    config: RunConfig, dataset: DatasetManifest, checkpoint: CheckpointManifest, storage: Storage, report: Report
) -> EvaluationManifest:
    """Score the checkpoint on the connected Ray cluster. `report` is called where the work is done.

    Raises ValueError for wrong input, and Ray's own error after `cluster.max_failures` restarts.
    """
    found = committed(config, dataset, checkpoint, storage)
    if found is not None:
        return found
    if config.cluster.use_gpu and config.parallelism.world_size > 1:
        from jobs.on_ray.group import run_in_group  # here: it brings torch

        folder = f"runs/{config.run_id}/evaluate/ray"
        arguments = (*_plain(config, dataset, checkpoint), report)
        run_in_group(config, storage, _worker, name=f"evaluate-{checkpoint.step}", folder=folder, arguments=arguments)
    else:
        run_in_task(
            config, "evaluate", _evaluate, *_plain(config, dataset, checkpoint), report, gpus=wants_gpu(config.cluster)
        )
    found = committed(config, dataset, checkpoint, storage)
    assert found is not None
    return found


def _worker(loop_config: dict[str, Any]) -> None:
    import ray.train

    config_values, *rest = loop_config["arguments"]
    config = validate(config_values).at_size(ray.train.get_context().get_world_size())
    _evaluate(config.model_dump(mode="json"), *rest)


def _plain(config: RunConfig, dataset: DatasetManifest, checkpoint: CheckpointManifest) -> tuple[Any, ...]:
    return config.model_dump(mode="json"), dataset.model_dump_json(), checkpoint.model_dump_json()


def _evaluate(config_values: dict[str, Any], dataset: str, checkpoint: str, report: Report) -> None:
    from pipeline.evaluation.heldout import evaluate

    config = validate(config_values)
    evaluate(
        config,
        DatasetManifest.model_validate_json(dataset),
        CheckpointManifest.model_validate_json(checkpoint),
        open_storage(config.storage),
        report=report,
    )
