"""The evaluate stage on Ray: one task that scores the whole network, or with GPUs the group of workers that trained it.

A result that is already committed is found before Ray is asked for anything.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from jobs.cli import stage_main
from jobs.remote import run_in_task, wants_gpu
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
        _evaluate_in_workers(config, dataset, checkpoint, storage, report)
    else:
        run_in_task(
            config, "evaluate", _evaluate, *_plain(config, dataset, checkpoint), report, gpus=wants_gpu(config.cluster)
        )
    found = committed(config, dataset, checkpoint, storage)
    assert found is not None
    return found


def _evaluate_in_workers(
    config: RunConfig, dataset: DatasetManifest, checkpoint: CheckpointManifest, storage: Storage, report: Report
) -> None:
    from pyarrow.fs import FSSpecHandler, LocalFileSystem, PyFileSystem
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cluster = config.cluster
    TorchTrainer(
        _worker,
        train_loop_config={"arguments": (*_plain(config, dataset, checkpoint), report)},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl", timeout_s=int(config.training.step_timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=config.parallelism.world_size,
            use_gpu=True,
            resources_per_worker={"CPU": cluster.cpus_per_worker, "GPU": 1},
        ),
        run_config=RayRunConfig(
            name=f"evaluate-{checkpoint.step}",
            storage_path=storage.key(f"runs/{config.run_id}/evaluate/ray"),
            storage_filesystem=PyFileSystem(FSSpecHandler(storage.fs)) if config.storage.is_s3 else LocalFileSystem(),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
        ),
    ).fit()


def _worker(loop_config: dict[str, Any]) -> None:
    _evaluate(*loop_config["arguments"])


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


if __name__ == "__main__":
    sys.exit(stage_main("evaluate"))
