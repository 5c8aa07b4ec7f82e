"""What a rank puts on the wire in one optimizer step, in bytes, collective by collective.

With A micro-batches a step, n ranks in a group and weights of P elements in it, ring algorithms send (n - 1) / n of:

    weights      all-gather of P in the compute dtype, A times: forward, and backward again if they were freed
    gradients    reduce-scatter of P in fp32, A times
    copies       all-reduce of the shard's fp32 gradients over `replicate`: twice it
    tokens       rows to their experts and back, in forward, in backward, and once more with full checkpointing: A times
                 tokens * K * D for each way, of which (ep - 1) / ep leave the rank
    muon         pieces to owners and results back (pipeline/optim/sent.py, `bytes_by_rank`), the fullest rank

Dense weights are gathered over `shard`, experts over `efsdp` (each rank gathers the E / ep that it computes with).
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.schema import RunConfig
from pipeline.optim.plan import MuonPlan
from pipeline.optim.sent import bytes_by_rank
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
    rows = training.micro_batch * training.sequence_length * model.num_experts_per_tok * model.hidden_size
    layers = model.num_hidden_layers - model.first_k_dense_replace
    ways = 6 if training.activation_checkpointing == "full" else 4
    muon = 0
    if plan is not None:
        wire = 2 if config.optimizer.muon.wire_dtype == "bf16" else FP32
        muon = max(bytes_by_rank(plan, wire))
    return Traffic(
        weights=micro_batches * passes * itemsize,
        gradients=micro_batches * gathered * FP32,
        copies=2 * _leaving(sizes.total // parallelism.shard, parallelism.replicate) * FP32,
        tokens=micro_batches * layers * ways * _leaving(rows, parallelism.ep) * itemsize,
        muon=muon,
    )


def _leaving(elements: int, ranks: int) -> int:
    return elements * (ranks - 1) // ranks
