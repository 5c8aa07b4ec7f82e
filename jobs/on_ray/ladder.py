"""Rungs of a ladder as Ray tasks: one processor each, as many at once as there is room for."""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence

import ray

from jobs.on_ray.task import result_of, wants_gpu
from pipeline.config.schema import RunConfig
from pipeline.ladder.climb import Measure
from pipeline.ladder.rungs import Measured, Rung, configure
from pipeline.manifest import DatasetManifest

LOOK_S = 1.0  # without a timeout ray.wait lets no signal's handler run


def measure_with_ray(recipe: RunConfig, dataset: DatasetManifest, tokens_per_parameter: float) -> Measure:
    """On the connected cluster. A rung whose task dies is started again; it goes on from its checkpoint."""

    owner = uuid.uuid4().hex  # a task that Ray starts again takes over from its dead self

    def measure(rungs: Sequence[Rung]) -> dict[Rung, Measured]:
        task = ray.remote(_execute)
        needs = {"num_cpus": 1, "num_gpus": wants_gpu(recipe.cluster), "max_retries": recipe.cluster.max_failures}
        # a seed of all sizes before the next one: what is there if the command is stopped can be fitted
        ordered = sorted(rungs, key=lambda rung: (rung.seed, -rung.hidden))
        waiting = {}
        for rung in ordered:
            config = configure(recipe, rung, tokens_per_parameter, dataset.digest)
            values = config.model_dump(mode="json")
            waiting[task.options(name=rung.name, **needs).remote(values, dataset.identity, owner)] = rung
        found: dict[Rung, Measured] = {}
        while waiting:
            finished, _ = ray.wait(list(waiting), timeout=LOOK_S)
            for done in finished:
                rung = waiting.pop(done)
                found[rung] = result_of(done)
                loss = found[rung].loss
                said = f"held-out loss {loss:.4f}" if math.isfinite(loss) else "diverged"
                print(f"{rung.name}: {said}, {len(waiting)} runs left of this round", flush=True)
        return found

    return measure


def _execute(values: dict[str, object], dataset_identity: str, owner: str) -> Measured:
    from pipeline.ladder.run import execute  # here: torch, where the work is done

    return execute(values, dataset_identity, owner)
