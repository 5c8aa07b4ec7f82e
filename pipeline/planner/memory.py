"""What a rank of a training run holds at its peak, in bytes, as arithmetic on the configuration.

    parameters   fp32 shards (the optimizer's masters) and their fp32 gradients
    optimizer    Muon 4 bytes an element (2 with muon.momentum_dtype bf16), AdamW 8
    gathered     whole weights in the compute dtype: the head (kept), the embedding, and two blocks, the one at work and
                 the next, with the experts of all blocks where no axis cuts them; on the way back one unit's gradients in
                 the compute dtype and in fp32, to be reduced. With training.gather_once all of both, whole. With
                 training.expert_products fp8 also e4m3 copies of experts, for forward and the other way round for backward, of all
                 blocks where their weights are kept for a step, else of the one at work
    activations  what the blocks keep for backward (activations.py), what one checkpointed block needs while it is
                 computed again, and a chunk of logits with its gradient; with training.offload_activations not what waits on the host
    symmetric    buffers for rows whose splits are read on the device (pipeline/parallel/device_flight.py), from the first step on
    exchange     Muon's buffers: two buckets in flight and the workspace of Newton-Schulz (pipeline/optim/muon.py)

`activations` and `gathered` are at their peak together, at the start of backward; `exchange` comes after both are gone,
so the peak is the larger of the two. Loads of experts are taken as even, or as training.expert_capacity has room for; without it a rank whose experts draw r times the mean
keeps r times the routed part. Not counted: CUDA's context and NCCL's buffers (2 to 4 GB) and what the allocator wastes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from pipeline.config.schema import RunConfig
from pipeline.kernels.e4m3 import TILE
from pipeline.model.loss import CUDA_CHUNK
from pipeline.model.offload import LEAST, STAY
from pipeline.parallel.bounded import room_for_all
from pipeline.parallel.device_flight import Parcel
from pipeline.planner.activations import block_bytes, offloaded_bytes
from pipeline.planner.sizes import FP32, Sizes, momentum_itemsize
from pipeline.planner.traffic import on_device

RESERVED_GB = 4.0  # what is not counted here: CUDA's context, NCCL's buffers


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank."""

    parameters: int
    optimizer: int
    gathered: int
    activations: int
    symmetric: int
    exchange: int

    @property
    def peak(self) -> int:
        return self.parameters + self.optimizer + self.symmetric + max(self.gathered + self.activations, self.exchange)


def memory(config: RunConfig, sizes: Sizes, itemsize: int) -> Memory:
    """The fullest rank; `itemsize` of the compute dtype."""
    parallelism, muon = config.parallelism, config.optimizer.muon
    stored = -(-sizes.total // parallelism.shard)
    by_adamw = sizes.by_adamw(config.optimizer)
    by_muon = -(-(sizes.total - by_adamw) // parallelism.shard)
    state = momentum_itemsize(config.optimizer) * by_muon + 2 * FP32 * (-(-by_adamw // parallelism.shard))
    return Memory(
        parameters=2 * FP32 * stored,
        optimizer=state,
        gathered=_gathered(config, sizes, itemsize) + _fp8_copies(config, sizes),
        activations=_activations(config, itemsize),
        symmetric=_symmetric(config, itemsize),
        exchange=_exchange(config, sizes, 2 if muon.wire_dtype == "bf16" else FP32),
    )


def _gathered(config: RunConfig, sizes: Sizes, itemsize: int) -> int:
    if config.training.gather_once:
        dense = sizes.dense * (
            itemsize + FP32
        )  # with gradients; those of experts that no axis cuts are their masters' own
        experts = sizes.experts // config.parallelism.ep
        return dense + experts * (itemsize + (FP32 if config.parallelism.efsdp > 1 else 0))
    block = sizes.dense_of_block + sizes.experts_of_block // config.parallelism.ep
    blocks = 2 if config.training.reshard_after_forward else config.model.num_hidden_layers
    weights = (2 * sizes.embedding + blocks * block) * itemsize
    if (
        config.parallelism.efsdp == 1 and config.training.reshard_after_forward
    ):  # kept whole for a step (parallel/shard.py)
        layers = config.model.num_hidden_layers - config.model.first_k_dense_replace
        weights += max(0, layers - blocks) * (sizes.experts_of_block // config.parallelism.ep) * itemsize
    gradients = max(sizes.embedding, block) * (itemsize + FP32)
    return weights + gradients


def _fp8_copies(config: RunConfig, sizes: Sizes) -> int:
    if config.training.expert_products != "fp8":
        return 0
    elements = sizes.experts_of_block // config.parallelism.ep
    layers = config.model.num_hidden_layers - config.model.first_k_dense_replace
    lasting = config.parallelism.efsdp == 1 or config.training.gather_once
    copies = 2 * layers if lasting else 1
    return copies * (elements + FP32 * (elements // (TILE * TILE)))


def _activations(config: RunConfig, itemsize: int) -> int:
    model, training = config.model, config.training
    tokens = training.micro_batch * training.sequence_length
    dense = model.first_k_dense_replace
    kind = training.activation_checkpointing
    ep = config.parallelism.ep
    room = (training.expert_capacity or 1.0) if ep > 1 else 1.0
    block = partial(block_bytes, model, itemsize=itemsize, ep=ep, room=room)
    layers = [index >= dense for index in range(model.num_hidden_layers)]  # whether a mixture
    kept = sum(block(moe=moe, checkpointing=kind) for moe in layers)
    if training.offload_activations and tokens * model.hidden_size * itemsize >= LEAST:
        leaves = partial(offloaded_bytes, model, checkpointing=kind, itemsize=itemsize, ep=ep, room=room)
        kept -= sum(leaves(moe=moe) for moe in layers[:-STAY])
    if kind != "none":
        kept += block(moe=dense < model.num_hidden_layers, checkpointing="none")
    logits = 2 * min(CUDA_CHUNK, tokens) * model.vocab_size * FP32
    return tokens * kept + logits


def _symmetric(config: RunConfig, itemsize: int) -> int:
    training, model, ep = config.training, config.model, config.parallelism.ep
    if training.expert_capacity is None or not on_device(config, itemsize):
        return 0
    trips = 2 if training.interleave else 1
    tokens = training.micro_batch * training.sequence_length // trips
    rows = room_for_all(tokens, model.n_routed_experts, model.num_experts_per_tok, ep, training.expert_capacity)
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    parcels = Parcel(rows, model.hidden_size, dtype), Parcel(rows, model.n_routed_experts // ep, torch.float32)
    return sum(parcel.buffer_bytes(ep, trips) for parcel in parcels)


def _exchange(config: RunConfig, sizes: Sizes, wire: int) -> int:
    if config.optimizer.name != "muon":
        return 0
    share = -(-(sizes.matrices + sizes.experts) // config.parallelism.shard) * wire
    bucket = min(config.optimizer.muon.bucket_bytes, share)
    in_flight = 2 * 3 * bucket
    fp32_copies = 3 * bucket * FP32 // wire
    return in_flight + fp32_copies + 4 * bucket
