"""A model sharded as in training, for tests in process groups: experts over `ep`, then everything by FSDP."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from pipeline.config.schema import ModelConfig
from pipeline.model.experts import MoE
from pipeline.model.moonlight import Moonlight
from pipeline.parallel.dispatch import AllToAllDispatch


def sharded_model(config: ModelConfig, ep: int, seed: int, aux_loss_weight: float = 0.0) -> Moonlight:
    """Built on the meta device and filled shard by shard; gradients are summed over ranks."""
    world = dist.get_world_size()
    dense = init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))
    sparse = init_device_mesh("cpu", (world // ep, ep), mesh_dim_names=("efsdp", "ep"))
    with torch.device("meta"):
        model = Moonlight(config, aux_loss_weight=aux_loss_weight)
    for block in model.layers:
        if isinstance(block.mlp, MoE):
            experts = block.mlp.experts
            for name, stack in list(experts.named_parameters()):
                setattr(experts, name, torch.nn.Parameter(distribute_tensor(stack, sparse["ep"], [Shard(0)])))
            experts.dispatcher = AllToAllDispatch(sparse["ep"].get_group())
            fully_shard(experts, mesh=sparse["efsdp"])
        fully_shard(block, mesh=dense)
    fully_shard(model, mesh=dense)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    model.to_empty(device="cpu")
    model.reset_parameters(seed)
    return model
