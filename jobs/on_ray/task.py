"""One call of a library function in one Ray task, for stages that need a node but no group of workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayTaskError

from pipeline.config.schema import ClusterConfig, RunConfig
from pipeline.lease import Held, LeaseLost


def run_in_task(config: RunConfig, name: str, function: Callable[..., Any], *args: Any, gpus: int = 0) -> Any:
    """`function(*args)` on a node with as many cores as training uses, or as the largest node has.

    A ValueError, Held or LeaseLost is raised here as it was there, so that the user sees one line; anything else with Ray's traceback.
    """
    cpus = min(config.cluster.cpus_per_worker * config.parallelism.world_size, _largest_node())
    task = ray.remote(_call).options(name=name, num_cpus=cpus, num_gpus=gpus, max_retries=config.cluster.max_failures)
    return result_of(task.remote(function, args, max(1, int(cpus))))


def result_of(reference: Any) -> Any:
    """What a task returned; a ValueError as it was raised there, without Ray's traceback."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, ValueError | Held | LeaseLost):
            raise error.cause from None
        raise


def wants_gpu(cluster: ClusterConfig) -> int:
    return 1 if cluster.use_gpu else 0


def _call(function: Callable[..., Any], args: tuple[Any, ...], threads: int) -> Any:
    import torch  # where the work is done, not where it is asked for

    torch.set_num_threads(threads)
    return function(*args)


def _largest_node() -> float:
    return max(float(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
