"""What a run will need, as lines of text."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import psutil

from data_prep.identity import list_corpus
from data_prep.room import text_bytes
from jobs.cli import locate, parser, refusing
from pipeline.config.load import expand_path
from pipeline.config.schema import RunConfig
from pipeline.config.values import parse_size
from pipeline.planner.estimate import Estimate, Hardware, estimate
from pipeline.planner.memory import RESERVED_GB
from pipeline.planner.preparing import (
    TEXT_BYTES_A_SECOND,
    checkpoint_bytes,
    checkpoints_kept,
    mean_bytes,
    model_bytes,
    preparing,
)
from pipeline.workflow.duration import duration

GB = 1e9
OF_THE_ARITHMETIC = (
    "mfu",
    "peak_tflops",
    "gpu_memory",
    "network",
    "price",
    "corpus_bytes",
)  # options that --rehearse does not ask


@refusing
def command(arguments: Sequence[str] | None) -> int:
    """`jobs.plan`. Returns the exit code."""
    made = parser("plan", "What a run will need, before it is started.")
    made.add_argument("--mfu", type=float, help="share of the peak that forward and backward reach (GPU 0.39, CPU 0.5)")
    made.add_argument(
        "--peak-tflops", type=float, help="of one worker: dense bf16 of a GPU (989), fp32 of a CPU (0.1 a core)"
    )
    made.add_argument(
        "--gpu-memory", type=float, metavar="GB", help="of one worker (GPU 80, CPU its share of this machine)"
    )
    made.add_argument("--network", type=float, metavar="GB/S", help="per worker, between nodes (GPU 50)")
    made.add_argument("--price", type=float, metavar="DOLLARS", help="of one GPU, or worker on CPUs, for an hour")
    made.add_argument(
        "--corpus-bytes",
        metavar="SIZE",
        help="text in the sources, like 20TB; default: what is there, or what training needs at least",
    )
    made.add_argument("--rehearse", action="store_true", help="run one step of one rank on a GPU that is not there")
    made.add_argument(
        "--chip", help="rates of a rehearsal: h100, h200, b200, mi300x or a file like theirs (default h100)"
    )
    made.add_argument("--trace", metavar="FILE", help="write a rehearsal's time line for Perfetto")
    given = made.parse_args(arguments)
    if given.price is not None and not given.price >= 0:
        made.error(f"--price {given.price:g} must be 0 or more")
    if not given.rehearse and (given.chip or given.trace):
        made.error(f"{'--chip' if given.chip else '--trace'} belongs to a rehearsal: add --rehearse")
    unheard = [name for name in OF_THE_ARITHMETIC if getattr(given, name) is not None]
    if given.rehearse and unheard:
        made.error(
            f"--{unheard[0].replace('_', '-')} is not asked by a rehearsal, whose rates are the chip's (--chip): leave it out"
        )
    config, _ = locate(given.config, given.overrides)
    if given.rehearse:
        from jobs.views.rehearsal import rehearse_and_show  # here: it brings a device of its own

        return rehearse_and_show(config, given.chip or "h100", given.trace)
    hardware = _hardware(config, given)
    wrong = [f"{name} {value:g} must be above 0" for name, value in asdict(hardware).items() if not value > 0]
    if wrong or hardware.mfu > 1:
        made.error("; ".join(wrong) or f"--mfu {hardware.mfu:g} is a share of the peak: at most 1")
    return show(config, hardware, given.price, _corpus_bytes(config, given.corpus_bytes))


def _hardware(config: RunConfig, given: argparse.Namespace) -> Hardware:
    """What was given, else an H100, or on CPUs a worker's cores with its share of this machine's memory."""
    usual = Hardware()
    if not config.cluster.use_gpu:
        share = psutil.virtual_memory().total / GB / config.parallelism.world_size
        usual = Hardware.of_cpus(config.cluster.cpus_per_worker, share)
    told = {
        "peak_tflops": given.peak_tflops,
        "memory_gb": given.gpu_memory,
        "network_gb_s": given.network,
        "mfu": given.mfu,
    }
    return replace(usual, **{name: value for name, value in told.items() if value is not None})


def _corpus_bytes(config: RunConfig, given: str | None) -> int | None:
    """What was given, else what the sources' folders hold; None if they are not all on this machine."""
    if given is not None:
        size = parse_size(given if not given.isdecimal() else int(given))
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"--corpus-bytes {given}: give bytes above 0, or 20TB")
        return size
    if any(
        source.path.startswith("s3://") or not Path(expand_path(source.path)).exists()
        for source in config.corpus.sources
    ):
        return None
    return text_bytes(config, list_corpus(config))


def show(config: RunConfig, hardware: Hardware, price: float | None, corpus_bytes: int | None = None) -> int:
    """Print the estimate. Returns the exit code: 0 if it fits into a worker's memory, else 1, with what would help."""
    found = estimate(config, hardware)
    print("\n".join(lines(config, found, hardware, price, corpus_bytes)))
    room = hardware.memory_gb - (RESERVED_GB if config.cluster.use_gpu else 0.0)
    if config.parallelism.elastic is not None:  # fewer workers hold more each
        config = config.at_size(min(config.sizes, key=lambda size: config.at_size(size).parallelism.shard))
        found = estimate(config, hardware)
        print(f"elastic    {smallest(config, found)}")
    if found.memory.peak / GB > room:
        print(f"\nit does not fit: {found.memory.peak / GB:.1f} GB of {room:.0f}. {remedy(config, found)}")
        return 1
    return 0


def lines(
    config: RunConfig, found: Estimate, hardware: Hardware, price: float | None, corpus_bytes: int | None
) -> Iterator[str]:
    parallelism, memory, traffic, step = config.parallelism, found.memory, found.traffic, found.step
    workers, one = parallelism.world_size, "GPU" if config.cluster.use_gpu else "worker"
    yield (
        f"{config.run_id}: {workers:,} {one}{'s' * (workers > 1)}, replicate {parallelism.replicate} x shard {parallelism.shard} "
        f"(experts: efsdp {parallelism.efsdp} x ep {parallelism.ep})"
    )
    yield (
        f"network    {found.parameters.total:,} parameters, {found.parameters.active:,} used by a token; "
        f"{found.flops_per_token / 1e9:.2f} GFLOP a token"
    )
    yield _assumed(config, hardware)
    batches = ", ".join(f"{part.steps:,} of {part.sequences:,} sequences" for part in found.segments)
    yield f"steps      {found.steps:,}: {batches}, of {config.training.sequence_length:,} tokens each"
    yield (
        f"memory     {memory.peak / GB:.1f} GB a {one}: weights and gradients {memory.parameters / GB:.1f}, optimizer "
        f"{memory.optimizer / GB:.1f}, then gathered {memory.gathered / GB:.1f} and activations "
        f"{memory.activations / GB:.1f}, rows under way {memory.symmetric / GB:.1f}, later Muon's exchange {memory.exchange / GB:.1f}"
    )
    yield (
        f"traffic    {traffic.total / GB:.1f} GB a {one} and step: weights {traffic.weights / GB:.1f}, gradients "
        f"{traffic.gradients / GB:.1f}, between copies {traffic.copies / GB:.1f}, tokens {traffic.tokens / GB:.1f}, "
        f"Muon {traffic.muon / GB:.3f}; {step.wire:.2f} s, to be hidden behind the computation"
    )
    yield (
        f"step       {step.total:.2f} s at {hardware.mfu:.0%} MFU: forward and backward {step.model:.2f} s, "
        f"Newton-Schulz {step.newton_schulz:.3f} s (busiest rank {found.newton_schulz_imbalance:.2f} times the mean)"
    )
    hours = found.seconds * workers / 3600
    cost = "" if price is None else f", {_rounded(hours * price)} dollars"
    yield (
        f"run        {duration(found.seconds)}, {_rounded(hours)} {one} hours{cost}; {found.tokens_per_second:,.0f} tokens/s a {one}"
    )
    yield from _data_lines(config, corpus_bytes)


def _assumed(config: RunConfig, hardware: Hardware) -> str:
    if config.cluster.use_gpu:
        return (
            f"assumed    GPUs of {hardware.peak_tflops:,.0f} TFLOP/s and {hardware.memory_gb:,.0f} GB at {hardware.mfu:.0%} MFU, "
            f"{hardware.network_gb_s:,.0f} GB/s between nodes"
        )
    return (
        f"assumed    CPUs: a worker has {config.cluster.cpus_per_worker:g} cores with AVX-512, {hardware.peak_tflops * 1000:,.0f} GFLOP/s in fp32 "
        f"of which steps reach {hardware.mfu:.0%} (with AVX2 about a third less), and {hardware.memory_gb:,.1f} GB of this machine's memory"
    )


def _data_lines(config: RunConfig, corpus_bytes: int | None) -> Iterator[str]:
    needs = preparing(config, corpus_bytes)
    known = (
        "of text"
        if corpus_bytes is not None
        else "of text at least, for what training asks of it (--corpus-bytes SIZE tells more)"
    )
    yield (
        f"prepare    {_size(needs.text_bytes)} {known}, about {_count(needs.tokens)} tokens: "
        f"{_rounded(needs.cpu_seconds / 3600)} CPU hours at {TEXT_BYTES_A_SECOND / 1e6:.0f} MB/s a core"
    )
    checkpoint, kept, mean = checkpoint_bytes(config), checkpoints_kept(config), mean_bytes(config)
    together = needs.dataset_bytes + kept * checkpoint + mean + model_bytes(config)
    yield (
        f"storage    {_size(together)}: dataset {_size(needs.dataset_bytes)} (documents and packed rows), {kept:,} checkpoint{'s' * (kept != 1)} of "
        f"{_size(checkpoint)}, {f'their mean {_size(mean)}, ' if mean else ''}model {_size(model_bytes(config))}"
    )


def _size(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e6:,.1f} MB"


def _count(tokens: float) -> str:
    return f"{tokens / 1e9:,.1f} billion" if tokens >= 1e9 else f"{tokens / 1e6:,.1f} million"


def _rounded(value: float) -> str:
    """Whole from ten on, else two digits."""
    return f"{value:,.0f}" if value >= 10 or not value else f"{max(value, 0.0001):.2g}"


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
        if not training.offload_activations:
            return "Set training.offload_activations."
        return f"Lower training.sequence_length (now {training.sequence_length})."
    if memory.gathered > memory.parameters + memory.optimizer:
        return f"Raise parallelism.ep (now {config.parallelism.ep}), or set training.reshard_after_forward."
    return f"Raise parallelism.shard (now {config.parallelism.shard})."
