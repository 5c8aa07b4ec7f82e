"""A checkpoint's weights without the optimizer's state: the whole network, this rank's share of it, or block by block.

A checkpoint is a torch DCP folder, written by any number of ranks, of parameters, router biases, optimizer moments and
counters. DCP reads the tensors that are asked for and nothing else, about a third of the bytes, and lays them out for
whoever asks: one process, or the ranks of a mesh that need not be the one that trained.

Memory: 4 bytes a parameter (Moonlight: 64 GB) in one process, that divided by the ranks of `shard` on a mesh, and one
block (Moonlight: 2.3 GB) when streamed.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config.schema import ModelConfig, RunConfig
from pipeline.manifest import CheckpointManifest
from pipeline.model.moonlight import Moonlight
from pipeline.parallel.mesh import build_meshes
from pipeline.parallel.shard import shard_model
from pipeline.storage import Storage
from pipeline.training.checkpoint import load_tensors
from pipeline.training.commits import folder_of
from pipeline.training.files import CheckpointReader

# Prompts come in every shape, nothing is computed again where rows find no room, and scores are those of the weights as they are published.
OF_TRAINING_ALONE = {"compile": False, "expert_capacity": None, "expert_products": "compute_dtype"}


def load_model(config: RunConfig, checkpoint: CheckpointManifest, storage: Storage) -> Moonlight:
    """The network in eval mode with the checkpoint's weights and router biases, on CUDA if `cluster.use_gpu`.

    In one process: whole, in fp32. On the ranks of an initialised process group (a collective call): sharded as in
    training, with training's compute dtype, rows in buffers that fit, and no products in fp8.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if config.cluster.use_gpu else torch.device("cpu")
    model = empty_model(config.model)
    if dist.is_initialized():
        settings = config.training.model_copy(update=OF_TRAINING_ALONE)
        shard_model(model, build_meshes(config.parallelism, device.type), settings, device)
    model.to_empty(device=device)
    model.eval().requires_grad_(False)
    read_tensors(dict(model.state_dict()), checkpoint, storage)
    return model


def empty_model(config: ModelConfig) -> Moonlight:
    """The network on the meta device: names and shapes."""
    with torch.device("meta"):
        return Moonlight(config)


def stream_tensors(
    config: ModelConfig, checkpoint: CheckpointManifest, storage: Storage
) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights and router biases in the order of the network's state, in fp32 on the CPU, one block in memory."""
    state = empty_model(config).state_dict().items()
    for _, block in groupby(state, key=lambda item: item[0].split(".")[:2]):
        tensors = {name: torch.empty(meta.shape, dtype=meta.dtype) for name, meta in block}
        read_tensors(tensors, checkpoint, storage)
        while tensors:
            name = next(iter(tensors))
            yield name, tensors.pop(name)


def read_tensors(tensors: dict[str, Any], checkpoint: CheckpointManifest, storage: Storage) -> None:
    """Fill the named tensors from the checkpoint; collective if they are sharded.

    Raises ValueError that names a tensor which the checkpoint lacks or holds in another shape, and DamagedCheckpoint.
    """
    folder = folder_of(checkpoint)

    def check(stored: dict[str, tuple[int, ...]]) -> None:
        for name, tensor in tensors.items():
            if stored.get(name) != tuple(tensor.shape):
                found = f"has shape {list(stored[name])}" if name in stored else "is missing"
                raise ValueError(
                    f"checkpoint {storage.uri(folder)}: {name} {found}, expected shape {list(tensor.shape)}; "
                    "use the model section that the run was trained with"
                )

    group = dist.group.WORLD if dist.is_initialized() else None
    load_tensors(tensors, CheckpointReader(storage, checkpoint), group, check)
