"""FSDP2 and expert parallelism applied to a Moonlight on the meta device, and its initialisation shard by shard.

Order: experts over `ep`, checkpointing and compilation set per block, then `fully_shard` from the inside out.
Allocation (`to_empty`) and values (`reset_parameters`, a checkpoint, an import) come after, so no rank ever holds more
than its shards plus one tensor.

    experts stack [E, ...]   Shard(0) over `ep` (whole experts), then over `efsdp` by Shard(0); where efsdp * ep > E, so
                             that ranks would stay without an expert, by Shard(1): every rank holds a slice of each
    everything else          Shard(0) over `shard`, copied over `replicate`
    units of gathering       embedding, each block with its experts, and (final norm + head) together

A block compiles its pieces (pipeline/model/block.py); FSDP's hooks, expert exchanges and full checkpointing stay outside
of the graphs, selective checkpointing inside.

A block is one unit with two groups of parameters, each with its own mesh, rather than a unit for the experts inside of
the block's: hooks of an inner unit would run in the middle of what activation checkpointing recomputes, where weights
that are prefetched, or not, make the recomputation differ from the forward pass (selective checkpointing refuses that).

Gradients are summed, never averaged, in every group (`loss` is already divided by the global token count), and with
plain SUM, which gloo has, rather than the pre-multiplied sum of NCCL. An expert's gradient needs no other factor: the
all-to-all brings it the tokens of all ranks of its ep group, and efsdp and replicate groups add the rest.

Weights that no axis cuts (experts where efsdp is 1) are cast once a step: from the first micro-batch's forward to the last
one's backward they stay as they are, and their gradients add up here in fp32, to be reduced over copies once
(`keep_whole`). That costs E / ep experts of every layer in the compute dtype, and saves a cast, a copy and a reduction of
one rank for each pass of each micro-batch. Copies of them in fp8 last as long (`lasting_copies`). `training.gather_once`
does so with all weights: whole dense weights and their fp32 gradients on every rank, for one gathering and one reduction
a step in place of two and one a micro-batch.

Mixed precision is FSDP2's: fp32 shards (the optimizer's masters), bf16 gathered weights, fp32 reduction. Activations are
bf16 from the embedding on, so inputs are not cast: FSDP2 would look into containers and dataclasses, and rotary tables in
bf16 make neighbouring positions one (findings/fsdp2_casts_dataclass_inputs.sh). Sources: PyTorch FSDP2; torchtitan's measurements of explicit prefetch order for mixtures of experts
(issues #1581, #1968): the host waits for token counts inside each block, so implicit prefetch comes too late on CUDA.
"""

from __future__ import annotations

import logging
import shutil
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor, Shard

from pipeline.config.schema import TrainingConfig
from pipeline.model.block import Block
from pipeline.model.devices import check_fp8, is_gpu
from pipeline.model.experts import Experts, MoE
from pipeline.model.moonlight import Moonlight
from pipeline.model.offload import Offload
from pipeline.model.row_products import Fp8Copies
from pipeline.parallel import symmetric, wire_check
from pipeline.parallel.bounded import BoundedDispatch, Room
from pipeline.parallel.device_flight import Wire
from pipeline.parallel.dispatch import AllToAllDispatch, Dispatcher
from pipeline.parallel.mesh import Meshes

log = logging.getLogger(__name__)

Placement = Shard | ShardPlacementResult
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compute_dtype(training: TrainingConfig, device: torch.device) -> torch.dtype:
    """The dtype of gathered weights and activations: bf16 on CUDA and fp32 elsewhere unless the configuration says."""
    if training.compute_dtype == "auto":
        return torch.bfloat16 if is_gpu(device) else torch.float32
    return DTYPES[training.compute_dtype]


def shard_model(model: Moonlight, meshes: Meshes, training: TrainingConfig, device: torch.device) -> None:
    """Shard `model` (on the meta device) in place. Without meshes only checkpointing and compilation are applied.

    Raises ValueError where an expert stack cannot be cut evenly, reduced precision is asked of an unsharded model, fp8 of a
    device without it, compilation of a machine without a C compiler, or splits read on the device of ranks that cannot.
    """
    dtype = compute_dtype(training, device)
    if training.expert_products == "fp8":
        check_fp8(device)
    if training.compile:
        _require_compiler()
    layers = [cast(Block, block) for block in model.layers]
    if meshes.ep is not None:
        dispatcher = _dispatcher(training, meshes, device, layers[-1].input_layernorm.weight.shape[0] * dtype.itemsize)
        for block in layers:
            if isinstance(block.mlp, MoE):
                _spread_experts(block.mlp.experts, meshes.ep, dispatcher)
        model.interleave = training.interleave
    offload = Offload(device, len(layers)) if training.offload_activations else None
    for block in layers:
        block.activation_checkpointing = training.activation_checkpointing
        block.offload = offload
        if training.expert_products == "fp8" and isinstance(block.mlp, MoE):
            block.mlp.experts.fp8 = Fp8Copies()
        if training.compile:
            block.compile()

    if meshes.dense is None:
        if dtype != torch.float32:
            raise ValueError(
                f"training.compute_dtype {training.compute_dtype}: mixed precision needs FSDP, hence a process group; "
                "start with torchrun --nproc-per-node 1, or use fp32"
            )
        return
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=None if dtype == torch.float32 else torch.float32,
        cast_forward_inputs=False,
    )
    common: dict[str, Any] = {"mp_policy": policy, "reshard_after_forward": training.reshard_after_forward}
    dense = {"mesh": meshes.dense_fsdp, **common}

    expert_mesh = None if meshes.ep is None else _mesh_info(meshes.expert_fsdp)

    fully_shard(model.embed_tokens, **dense)
    for index, block in enumerate(layers):
        placements: dict[nn.Parameter, Placement] = {}
        if isinstance(block.mlp, MoE):
            experts = block.mlp.experts
            cut = Shard(_expert_dim(f"layers.{index}.mlp.experts", experts, meshes))
            placement = cut if expert_mesh is None else ShardPlacementResult(cut, expert_mesh)
            placements = dict.fromkeys(experts.parameters(), placement)
        fully_shard(block, shard_placement_fn=placements.get, **dense)
    fully_shard([model.norm, model.lm_head], mesh=meshes.dense_fsdp, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, **dense)

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    _set_prefetch_order(model)
    meshes.exposed.watch(model)


def whole_groups(model: nn.Module, *, cut_too: bool = False) -> list[FSDPParamGroup]:
    """FSDP's groups of parameters that no axis cuts; `cut_too`: all of them."""
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for state in states for group in state._fsdp_param_groups]
    sizes = [info.shard_mesh_size if isinstance(info := each.mesh_info, FSDPMeshInfo) else 0 for each in groups]
    return [each for each, size in zip(groups, sizes) if size == 1 or (cut_too and size > 1)]


def lasting_copies(model: nn.Module, whole: list[FSDPParamGroup]) -> list[Fp8Copies]:
    """Copies in fp8 of weights that last for a step, being in one of the `whole` groups or not FSDP's at all; those of others are made in
    each pass, as their weights are."""
    lasting = {param._module_info.module for group in whole for param in group.fsdp_params}
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    return [each.fp8 for each in experts if each.fp8 and (each in lasting or not isinstance(model, FSDPModule))]


def room_of(model: nn.Module) -> Room | None:
    """Of a network whose rows travel in buffers of fixed size: which all its layers share."""
    dispatchers = [module.dispatcher for module in model.modules() if isinstance(module, Experts)]
    return next((each.room for each in dispatchers if isinstance(each, BoundedDispatch)), None)


def keep_whole(groups: list[FSDPParamGroup], last: bool) -> None:
    """Before a micro-batch: its backward keeps gathered weights and gradients of `groups` unless it is the `last` one."""
    for group in groups:
        group.post_forward_mesh_info = None  # what forward gathered, backward uses
        group.reshard_after_backward = group.reduce_grads = last


def _require_compiler() -> None:
    """Triton builds its driver module, and Inductor its CPU kernels, when they first run; their own message comes from deep inside."""
    if not any(shutil.which(name) for name in ("gcc", "clang", "cc")):
        raise ValueError(
            "training.compile true: torch.compile needs a C compiler where training runs, and there is no gcc, clang or cc on the "
            "PATH; use an image that has one (rayproject/ray's GPU images do), or training.compile=false"
        )


def _dispatcher(training: TrainingConfig, meshes: Meshes, device: torch.device, row_bytes: int) -> Dispatcher:
    """What all mixture layers bring rows to their experts by. Raises ValueError where splits cannot be read on the device and have to be."""
    assert meshes.ep is not None
    group, exposed = meshes.ep.get_group(), meshes.exposed
    if training.expert_capacity is None:
        return AllToAllDispatch(group, exposed)
    wire = None
    if training.expert_splits != "equal":
        trips = 2 if training.interleave else 1
        missing = symmetric.missing(device, group, row_bytes)
        if missing is None and device.type == "cuda":  # not a rehearsal's stand-in, of which nobody reads numbers
            missing = wire_check.fault(Wire(group, device, trips=trips), row_bytes)
        if missing and training.expert_splits == "device":
            raise ValueError(f"training.expert_splits device: {missing}; use auto, or equal")
        if missing and is_gpu(device) and dist.get_rank() == 0:
            log.warning(
                "training.expert_splits auto: all the room of training.expert_capacity travels, in equal parts: %s",
                missing,
            )
        wire = None if missing else Wire(group, device, exposed, trips)
    return BoundedDispatch(group, Room(training.expert_capacity), exposed, wire)


def _spread_experts(experts: Experts, ep: DeviceMesh, dispatcher: Dispatcher) -> None:
    """Keep E / ep whole experts on each rank of the axis, as DTensor parameters, and route tokens between the ranks."""
    for name, parameter in list(experts.named_parameters(recurse=False)):
        size = parameter.shape[0]
        assert size % ep.size() == 0, (name, size, ep.size())  # refused by the configuration
        local = parameter.detach().narrow(0, ep.get_local_rank() * (size // ep.size()), size // ep.size())
        spread = DTensor.from_local(local, ep, [Shard(0)], run_check=False)
        setattr(experts, name, nn.Parameter(spread, requires_grad=parameter.requires_grad))
    experts.dispatcher = dispatcher


def _expert_dim(name: str, experts: nn.Module, meshes: Meshes) -> int:
    """The dim that FSDP cuts: 0 while every rank gets an expert, else 1."""
    assert meshes.sparse is not None
    cuts = meshes.sparse["efsdp"].size()
    for stack_name, stack in experts.named_parameters(recurse=False):
        if stack.shape[0] >= cuts * meshes.sparse["ep"].size():
            continue
        if stack.shape[1] % cuts:
            raise ValueError(
                f"{name}.{stack_name} {tuple(stack.shape)}: {stack.shape[0]} experts are fewer than efsdp * ep = "
                f"{cuts * meshes.sparse['ep'].size()} ranks, and dim 1 cannot be cut into {cuts} equal parts; "
                "raise parallelism.replicate, or lower parallelism.shard"
            )
        return 1
    return 0


def _mesh_info(mesh: DeviceMesh) -> FSDPMeshInfo:
    if mesh.ndim == 1:
        return FSDPMeshInfo(mesh, shard_mesh_dim=0)
    return HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0)


def _set_prefetch_order(model: Moonlight) -> None:
    """Gather a block's weights while the one before it computes; on the way back, the one after it."""
    units: list[Any] = [model.embed_tokens, *model.layers, model.lm_head]
    for now, following in zip(units, units[1:]):
        now.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([now])
