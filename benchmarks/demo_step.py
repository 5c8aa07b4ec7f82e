"""The demo's step on the gloo ranks of a process group, on random tokens: what benchmarks of a step share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipeline.config.load import load_config
from pipeline.model.moonlight import Moonlight
from pipeline.parallel.mesh import Meshes, build_meshes
from pipeline.training.batches import MicroBatch, StepBatch
from pipeline.training.guard import Guard
from pipeline.training.step import Step
from pipeline.training.trainer import build


@dataclass(frozen=True)
class Demo:
    model: Moonlight
    meshes: Meshes
    step: Step
    batch: StepBatch  # this rank's part of the global one


def demo_step(ep: int) -> Demo:
    """Sharded over all ranks, experts over groups of `ep`."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    config = load_config("debug", [f"parallelism={{shard: {ranks}, ep: {ep}}}"])
    device, training = torch.device("cpu"), config.training
    meshes = build_meshes(config.parallelism, "cpu")
    model, optimizer = build(config, meshes, device)
    generator = torch.Generator().manual_seed(rank)
    shape = (training.micro_batch, training.sequence_length)
    micro_batches = []
    for _ in range(config.schedule.global_batch[0].sequences // (ranks * training.micro_batch)):
        tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
        micro_batches.append(MicroBatch(tokens, tokens, [training.sequence_length] * training.micro_batch, None))
    batch = StepBatch(micro_batches, sum(micro.labels_BS.numel() for micro in micro_batches))
    return Demo(model, meshes, Step(model, optimizer, Guard(device), meshes, config.optimizer, device), batch)
