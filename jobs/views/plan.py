"""What a run will need, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.schema import RunConfig
from pipeline.planner.estimate import Estimate, Hardware, estimate
from pipeline.workflow.record import duration

GB = 1e9
RESERVED_GB = 4.0  # CUDA's context, NCCL's buffers


def show(config: RunConfig, hardware: Hardware, price: float | None) -> int:
    """Print the estimate. Returns the exit code: 0 if it fits into a GPU's memory, else 1, with what would help."""
    found = estimate(config, hardware)
    print("\n".join(lines(config, found, hardware, price)))
    room = hardware.memory_gb - RESERVED_GB
    if config.parallelism.elastic is not None:  # fewer workers hold more each
        config = config.at_size(min(config.sizes, key=lambda size: config.at_size(size).parallelism.shard))
        found = estimate(config, hardware)
        print(f"elastic    {smallest(config, found)}")
    if found.memory.peak / GB > room:
        print(f"\nit does not fit: {found.memory.peak / GB:.1f} GB of {room:.0f}. {remedy(config, found)}")
        return 1
    return 0


def lines(config: RunConfig, found: Estimate, hardware: Hardware, price: float | None) -> Iterator[str]:
    parallelism, memory, traffic, step = config.parallelism, found.memory, found.traffic, found.step
    gpus = parallelism.world_size
    yield (
        f"{config.run_id}: {gpus} GPUs, replicate {parallelism.replicate} x shard {parallelism.shard} "
        f"(experts: efsdp {parallelism.efsdp} x ep {parallelism.ep})"
    )
    yield (
        f"network    {found.parameters.total:,} parameters, {found.parameters.active:,} used by a token; "
        f"{found.flops_per_token / 1e9:.2f} GFLOP a token"
    )
    yield (
        f"assumed    GPUs of {hardware.peak_tflops:,.0f} TFLOP/s and {hardware.memory_gb:,.0f} GB at {hardware.mfu:.0%} MFU, "
        f"{hardware.network_gb_s:,.0f} GB/s between nodes"
        + ("" if config.cluster.use_gpu else "; this configuration runs on CPUs, for which time and cost say nothing")
    )
    batches = ", ".join(f"{part.steps:,} of {part.sequences:,} sequences" for part in found.segments)
    yield f"steps      {found.steps:,}: {batches}, of {config.training.sequence_length:,} tokens each"
    yield (
        f"memory     {memory.peak / GB:.1f} GB a GPU: weights and gradients {memory.parameters / GB:.1f}, optimizer "
        f"{memory.optimizer / GB:.1f}, then gathered {memory.gathered / GB:.1f} and activations "
        f"{memory.activations / GB:.1f}, later Muon's exchange {memory.exchange / GB:.1f}"
    )
    yield (
        f"traffic    {traffic.total / GB:.1f} GB a GPU and step: weights {traffic.weights / GB:.1f}, gradients "
        f"{traffic.gradients / GB:.1f}, between copies {traffic.copies / GB:.1f}, tokens {traffic.tokens / GB:.1f}, "
        f"Muon {traffic.muon / GB:.3f}; {step.wire:.2f} s, to be hidden behind the computation"
    )
    yield (
        f"step       {step.total:.2f} s at {hardware.mfu:.0%} MFU: forward and backward {step.model:.2f} s, "
        f"Newton-Schulz {step.newton_schulz:.3f} s (busiest rank {found.newton_schulz_imbalance:.2f} times the mean)"
    )
    hours = found.seconds * gpus / 3600
    cost = f", {hours * price:,.0f} dollars" if price is not None else ""
    yield (
        f"run        {duration(found.seconds)}, {hours:,.0f} GPU hours{cost}; {found.tokens_per_second:,.0f} tokens/s a GPU"
    )
    yield f"storage    {found.checkpoint_bytes / GB:,.1f} GB a checkpoint, {config.checkpoint.keep} kept"


def smallest(config: RunConfig, found: Estimate) -> str:
    """The fullest GPU of an elastic run: with the smallest shard."""
    mesh = config.parallelism
    return (
        f"{found.memory.peak / GB:.1f} GB a GPU on {mesh.world_size} (replicate {mesh.replicate} x shard {mesh.shard}), the fullest; "
        f"step {found.step.total:.2f} s there"
    )


def remedy(config: RunConfig, found: Estimate) -> str:
    """The setting that takes most of what is too much."""
    memory, training = found.memory, config.training
    if memory.activations > memory.parameters + memory.optimizer + memory.gathered:
        if training.micro_batch > 1:
            return f"Lower training.micro_batch (now {training.micro_batch})."
        stronger = {"none": "selective", "selective": "full"}.get(training.activation_checkpointing)
        if stronger:
            return f"Set training.activation_checkpointing to {stronger}."
        return f"Lower training.sequence_length (now {training.sequence_length})."
    if memory.gathered > memory.parameters + memory.optimizer:
        return f"Raise parallelism.ep (now {config.parallelism.ep}), or set training.reshard_after_forward."
    return f"Raise parallelism.shard (now {config.parallelism.shard})."
