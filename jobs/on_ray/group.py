"""One function in as many Ray Train workers as the mesh has ranks, joined into one process group.

Ray starts the group, and starts it again when a worker dies, `cluster.max_failures` times; with `parallelism.elastic` on as many workers as
there is room for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from pyarrow.fs import FSSpecHandler, LocalFileSystem, PyFileSystem
from ray.train import FailureConfig, LoggingConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from jobs.on_ray.elastic import ElasticTrainer, Pause
from jobs.on_ray.failed import WorkersFailed, told
from pipeline.config.schema import RunConfig
from pipeline.storage import Storage


def run_in_group(
    config: RunConfig,
    storage: Storage,
    worker: Callable[[dict[str, Any]], Any],
    *,
    name: str,
    folder: str,
    pause: Pause | None = None,
    **arguments: Any,
) -> Any:
    """Call `worker(arguments)` in every rank; returns what rank 0 returned. Ray keeps its own state in `folder` of the storage.

    `pause`: how the workers of an elastic run are asked to save before their group grows; without it a group does not grow.
    Raises WorkersFailed after the last restart.
    """
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # workers keep the job's working directory; Ray carries this one to them
    cluster, elastic = config.cluster, config.parallelism.elastic
    kind: Any = TorchTrainer if elastic is None else partial(ElasticTrainer, sizes=config.sizes, pause=pause)
    trainer: Any = kind(
        cast(Any, worker),
        train_loop_config=arguments,
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if cluster.use_gpu else "gloo", timeout_s=int(config.training.step_timeout_s)
        ),
        scaling_config=cast(Any, ScalingConfig)(
            num_workers=config.parallelism.world_size if elastic is None else (config.sizes[0], config.sizes[-1]),
            elastic_resize_monitor_interval_s=math.inf if elastic is None or pause is None else elastic.look_every_s,
            use_gpu=cluster.use_gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": 1} if cluster.use_gpu else {})},
        ),
        run_config=cast(Any, RayRunConfig)(
            name=name,
            storage_path=storage.key(folder),
            storage_filesystem=PyFileSystem(FSSpecHandler(storage.fs)) if config.storage.is_s3 else LocalFileSystem(),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),  # on the screen; its files have every state of the group
        ),
    )
    try:
        return trainer.fit().return_value
    except TrainingFailedError as error:
        raise WorkersFailed(told(error, cluster.max_failures)) from error
