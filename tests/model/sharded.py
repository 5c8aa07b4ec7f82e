"""A model sharded as training does it, for tests in process groups."""

import torch
import torch.distributed as dist

from pipeline.config.schema import ModelConfig
from pipeline.config.training import ParallelismConfig, TrainingConfig
from pipeline.model.moonlight import Moonlight
from pipeline.parallel.mesh import build_meshes
from pipeline.parallel.shard import shard_model


def sharded_model(config: ModelConfig, ep: int, seed: int, aux_loss_weight: float = 0.0) -> Moonlight:
    """Built on the meta device and filled shard by shard; gradients are summed over ranks."""
    with torch.device("meta"):
        model = Moonlight(config, aux_loss_weight=aux_loss_weight)
    meshes = build_meshes(ParallelismConfig(shard=dist.get_world_size(), ep=ep), "cpu")
    shard_model(model, meshes, TrainingConfig(compute_dtype="fp32"), torch.device("cpu"))
    model.to_empty(device="cpu")
    model.reset_parameters(seed)
    return model
