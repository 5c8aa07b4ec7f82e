"""How many workers an elastic run may have (`parallelism.elastic`).

A number is one of its sizes if its mesh exists (`ParallelismConfig.at`), every batch of the schedule divides by it in whole
micro-batches, and the experts can be cut evenly. The global batch is the same at each: fewer workers accumulate more micro-batches.
"""

from __future__ import annotations

from pipeline.config.network import ModelConfig
from pipeline.config.schedule import ScheduleConfig
from pipeline.config.training import ParallelismConfig, TrainingConfig

SHOWN = 12  # sizes that a message lists


def valid_sizes(
    parallelism: ParallelismConfig, model: ModelConfig, training: TrainingConfig, schedule: ScheduleConfig
) -> tuple[int, ...]:
    """Ascending. Without `elastic` the one that the mesh has."""
    elastic = parallelism.elastic
    if elastic is None:
        return (parallelism.world_size,)
    most = elastic.max_workers or parallelism.world_size
    return _sizes(parallelism, model, training, schedule, elastic.min_workers, most)


def refused_sizes(
    parallelism: ParallelismConfig, model: ModelConfig, training: TrainingConfig, schedule: ScheduleConfig
) -> list[str]:
    """Why training cannot have the sizes that are asked for; each message starts with the key to change."""
    elastic = parallelism.elastic
    if not _experts_cut(parallelism, model):
        return [
            f"parallelism.shard {parallelism.shard}: {model.n_routed_experts} experts are fewer, and hidden_size {model.hidden_size} and "
            f"moe_intermediate_size {model.moe_intermediate_size} cannot both be cut into efsdp {parallelism.efsdp} equal parts; raise "
            "replicate or lower shard"
        ]
    least = parallelism.world_size if elastic is None else elastic.min_workers
    if training.recompute_every is not None and least < 2 * parallelism.ep:
        return [
            f"training.recompute_every {training.recompute_every}: {least} workers are one group of parallelism.ep {parallelism.ep}, and another "
            "one is needed to compute what it computed; lower ep, use more workers, or leave it out"
        ]
    if elastic is None:
        return []
    most = elastic.max_workers or parallelism.world_size
    if not elastic.min_workers <= parallelism.world_size <= most:
        return [
            f"parallelism.elastic: replicate * shard = {parallelism.world_size} workers must lie between min_workers "
            f"{elastic.min_workers} and max_workers {most}"
        ]
    found = []
    possible = _sizes(parallelism, model, training, schedule, 1, most + parallelism.shard)
    for key, limit in (("min_workers", elastic.min_workers), ("max_workers", most)):
        if limit not in possible:
            near = sorted(sorted(possible, key=lambda size: abs(size - limit))[:SHOWN])
            found.append(
                f"parallelism.elastic.{key} {limit} is no size of this run: whole replicas of shard {parallelism.shard}, or fewer workers "
                f"in multiples of ep {parallelism.ep}, with every schedule.global_batch a multiple of workers * micro_batch "
                f"{training.micro_batch}; sizes near it are {', '.join(map(str, near))}"
            )
    return found


def _sizes(
    parallelism: ParallelismConfig,
    model: ModelConfig,
    training: TrainingConfig,
    schedule: ScheduleConfig,
    least: int,
    most: int,
) -> tuple[int, ...]:
    batches = {stage.sequences for stage in schedule.global_batch}
    most = min(most, *batches)
    return tuple(
        workers
        for workers in range(least, most + 1)
        if all(batch % (workers * training.micro_batch) == 0 for batch in batches)
        and (mesh := parallelism.at(workers)) is not None
        and _experts_cut(mesh, model)
    )


def _experts_cut(mesh: ParallelismConfig, model: ModelConfig) -> bool:
    """As pipeline/parallel/shard.py cuts them: whole experts to each rank, or else equal slices of each."""
    mixture = model.first_k_dense_replace < model.num_hidden_layers
    even = model.hidden_size % mesh.efsdp == 0 and model.moe_intermediate_size % mesh.efsdp == 0
    return model.n_routed_experts >= mesh.shard or even or not mixture
