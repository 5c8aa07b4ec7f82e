"""What a rank puts on the wire in one optimizer step, in bytes, collective by collective.

With A micro-batches a step, n ranks in a group and weights of P elements in it, ring algorithms send (n - 1) / n of:

    weights      all-gather of P in the compute dtype, A times: forward, and backward again if they were freed
    gradients    reduce-scatter of P in fp32, A times; both once with training.gather_once
    copies       all-reduce of the shard's fp32 gradients over `replicate`: twice it
    tokens       a row for each rank that a token meets (pipeline/parallel/dispatch.py; evenly routed,
                 or all the room of training.expert_capacity where splits are not read on the device), there and back, in
                 forward, in backward, and once more with full checkpointing: A times tokens * met * D for each way, with
                 E / ep weights in fp32 on the way there; (ep - 1) / ep leave the rank
    muon         pieces to owners and results back (pipeline/optim/sent.py, `bytes_by_rank`), the fullest rank

Dense weights are gathered over `shard`, experts over `efsdp` (each rank gathers the E / ep that it computes with).
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.schema import RunConfig
from pipeline.optim.plan import MuonPlan
from pipeline.optim.sent import bytes_by_rank
from pipeline.parallel.dispatch import ranks_met
from pipeline.parallel.symmetric import divides
from pipeline.planner.sizes import FP32, Sizes


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step."""

    weights: int
    gradients: int
    copies: int
    tokens: int
    muon: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.copies + self.tokens + self.muon


def traffic(config: RunConfig, sizes: Sizes, plan: MuonPlan | None, sequences: int, itemsize: int) -> Traffic:
    """Of a step with a global batch of `sequences`; `itemsize` of the compute dtype."""
    parallelism, training, model = config.parallelism, config.training, config.model
    micro_batches = sequences // (parallelism.world_size * training.micro_batch)
    gathered = _leaving(sizes.dense, parallelism.shard) + _leaving(sizes.experts // parallelism.ep, parallelism.efsdp)
    kept = _leaving(sizes.embedding + model.hidden_size, parallelism.shard)  # head and last norm are gathered once
    passes = 2 * gathered - kept if training.reshard_after_forward else gathered
    times = micro_batches
    if training.gather_once:
        times, passes = 1, gathered
    met = ranks_met(model.n_routed_experts, model.num_experts_per_tok, parallelism.ep)
    room = 1.0 if on_device(config, itemsize) else training.expert_capacity or 1.0
    rows = int(training.micro_batch * training.sequence_length * met * room)
    layers = model.num_hidden_layers - model.first_k_dense_replace
    muon = 0
    if plan is not None:
        wire = 2 if config.optimizer.muon.wire_dtype == "bf16" else FP32
        muon = max(bytes_by_rank(plan, wire))
    return Traffic(
        weights=times * passes * itemsize,
        gradients=times * gathered * FP32,
        copies=2 * _leaving(sizes.total // parallelism.shard, parallelism.replicate) * FP32,
        tokens=micro_batches * layers * _leaving(rows, parallelism.ep) * row_bytes(config, itemsize),
        muon=muon,
    )


def row_bytes(config: RunConfig, itemsize: int) -> int:
    """Of one row, all its ways in a pass forward and backward."""
    turns = 3 if config.training.activation_checkpointing == "full" else 2
    weights = config.model.n_routed_experts // config.parallelism.ep * FP32
    return turns * (2 * config.model.hidden_size * itemsize + weights)


def on_device(config: RunConfig, itemsize: int) -> bool:
    """Whether the number of rows that travel is read on the device: `auto` means a GPU with NVSHMEM here."""
    if config.training.expert_capacity is None or config.training.expert_splits == "equal":
        return False
    return config.parallelism.ep > 1 and divides(config.parallelism.ep, config.model.hidden_size * itemsize)


def _leaving(elements: int, ranks: int) -> int:
    return elements * (ranks - 1) // ranks
