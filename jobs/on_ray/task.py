"""Calls of library functions in Ray tasks, for stages that need a node but no group of workers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError

from jobs.on_ray.local import EVALUATOR
from pipeline.config.schema import ClusterConfig, RunConfig
from pipeline.lease import Held, LeaseLost


@dataclass(frozen=True)
class Place:
    """Beside training: on nodes that offer EVALUATOR, if there are any, without a share of their CPUs, and behind everybody else
    there (`step_back`)."""

    resource: bool


def beside_training() -> Place:
    return Place(resource=ray.cluster_resources().get(EVALUATOR, 0) > 0)


def run_in_task(
    config: RunConfig,
    name: str,
    function: Callable[..., Any],
    *args: Any,
    gpus: int = 0,
    place: Place | None = None,
) -> Any:
    """`function(*args)` on a node with as many cores as training uses, or as the largest node has.

    A ValueError, Held or LeaseLost is raised here as it was there, so that the user sees one line; anything else with Ray's traceback.
    """
    return run_in_tasks(config, name, [(function, *args)], gpus=gpus, place=place)[0]


def run_in_tasks(
    config: RunConfig, name: str, calls: Sequence[tuple[Any, ...]], *, gpus: int = 0, place: Place | None = None
) -> list[Any]:
    """The same of several (function, *args) at once, each as large as one alone would be; their results in order."""
    cpus = min(config.cluster.cpus_per_worker * config.parallelism.world_size, _largest_node())
    options: dict[str, Any] = {"num_cpus": cpus}
    if place is not None and place.resource:
        options = {"num_cpus": 0, "resources": {EVALUATOR: 1 / len(calls)}}
    # A process that has stepped back cannot step forward again: it does no other task.
    remote = ray.remote(_call) if place is None else ray.remote(max_calls=1)(_call)
    task = remote.options(name=name, num_gpus=gpus, max_retries=config.cluster.max_failures, **options)
    behind = place is not None and not gpus
    found = [task.remote(function, args, max(1, int(cpus)), behind) for function, *args in calls]
    results: list[Any] = result_of(found)
    return results


def result_of(reference: Any) -> Any:
    """What a task, or each of a list, returned; a ValueError as it was raised there, without Ray's traceback."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, ValueError | Held | LeaseLost):
            raise error.cause from None
        raise


def wants_gpu(cluster: ClusterConfig) -> int:
    return 1 if cluster.use_gpu else 0


def _call(function: Callable[..., Any], args: Sequence[Any], threads: int, behind: bool) -> Any:
    import torch  # where the work is done, not where it is asked for

    if behind:
        step_back()
    torch.set_num_threads(threads)
    return function(*args)


def step_back() -> None:
    """Let this process run when nobody else of the node wants the core. Ray starts its workers at niceness 15, beside which one of 19 still gets 3
    parts of 10 of a core that both want; the kernel's idle class gets 1 of 13. Threads that begin later do as this one does."""
    os.nice(19)
    if hasattr(os, "SCHED_IDLE"):  # of Linux
        with contextlib.suppress(PermissionError):  # a container may forbid it
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _largest_node() -> float:
    return max(float(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
