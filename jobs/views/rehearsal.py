"""A rehearsed step, as lines of text."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from pipeline.config.schema import RunConfig
from pipeline.planner.memory import RESERVED_GB
from pipeline.rehearsal.chips import Chip, check_chip, load_chip
from pipeline.rehearsal.fuse import fuse
from pipeline.rehearsal.recorder import FROM_HOST, TO_HOST
from pipeline.rehearsal.step import BEHIND, CHECKPOINT, Rehearsal, rehearse
from pipeline.rehearsal.tape import MAIN, Collective, Kernel
from pipeline.rehearsal.timeline import Timeline, simulate
from pipeline.rehearsal.trace import to_trace
from pipeline.training.flops import flops_per_token

GB = 1e9
KINDS = {
    "matmul": "products", "grouped": "products of experts", "grouped_fp8": "products of experts in fp8", "matmul_fp32": "products in fp32", "attention_forward": "attention",
    "attention_backward": "attention backward", "own": "kernels of our own", "memory": "memory",
    "host_copy": "copies between host and device",
}  # fmt: skip


def _bytes(count: float) -> str:
    return f"{count / GB:8.2f} GB" if count >= GB / 10 else f"{count / 1e6:8.2f} MB"


def _time(seconds: float) -> str:
    return f"{seconds:8.3f} s" if seconds >= 0.1 else f"{seconds * 1e3:7.2f} ms"


def room(chip: Chip) -> int:
    """Bytes of the chip's memory that a run may take."""
    return round((chip.memory_gb - RESERVED_GB) * GB)


def rehearse_and_show(config: RunConfig, chip_name: str, trace: str | None) -> int:
    """Run the step and print what it was. Returns the exit code: 0 if it fits into the chip's memory, else 1. Raises ValueError."""
    chip = load_chip(chip_name)
    if trace:
        _can_be_written(Path(trace))
    check_chip(chip, config)
    found = rehearse(config, limit=room(chip))
    timeline = simulate(found.whole(fuse(found.run) if config.training.compile else None), chip)
    print("\n".join(lines(config, found, timeline, chip)))
    if trace:
        Path(trace).write_text(to_trace(timeline, f"{config.run_id}, rank 0, {chip.name}"))
        print(f"trace      {trace}: open it at https://ui.perfetto.dev")
    if found.memory.too_much is None:
        return 0
    holder, size = found.memory.too_much
    print(
        f"\nit does not fit: {room(chip) / GB:.0f} GB are used up in {holder.phase} when {holder.where} takes {size / GB:.2f} GB more "
        f"({holder.what})"
    )
    return 1


def _can_be_written(trace: Path) -> None:
    """Asked before the minutes that it takes to have something to write. Raises ValueError."""
    folder = trace.absolute().parent
    if trace.is_dir() or not folder.is_dir():
        raise ValueError(
            f"--trace {trace}: {'a folder' if trace.is_dir() else f'there is no folder {folder}'}; name a file"
        )
    if not os.access(trace if trace.exists() else folder, os.W_OK):
        raise ValueError(f"--trace {trace}: must not be written here; name another file")


def lines(config: RunConfig, found: Rehearsal, timeline: Timeline, chip: Chip) -> Iterator[str]:
    memory, training = found.memory, config.training
    yield (
        f"rehearsed  rank 0 of {config.parallelism.world_size:,}: {found.micro_batches} micro-batches of {training.micro_batch} x "
        f"{training.sequence_length:,} tokens, even routing, on one {chip.name} by the rates of its file"
        + (", elementwise work fused as compiled" if training.compile else "")
    )
    phases = ", ".join(f"{phase} {_bytes(size).strip()}" for phase, size in memory.by_phase.items() if phase != "build")
    yield f"memory     {_bytes(memory.peak).strip()} at most ({phases}), {_bytes(found.state_bytes).strip()} before the step"
    for holder, size in memory.held_at_peak()[:5]:
        yield f"           {_bytes(size)}  {holder.what}  {holder.where} ({holder.phase})"
    share = (
        flops_per_token(config.model, training.sequence_length)
        * found.tokens
        / timeline.seconds
        / (chip.peak_tflops * 1e12)
    )
    yield (
        f"step       {_time(timeline.seconds).strip()}: {share:.1%} MFU of {chip.peak_tflops:,.0f} TFLOP/s, "
        f"{found.tokens / timeline.seconds:,.0f} tokens/s a GPU"
    )
    for kind, seconds in sorted(timeline.busy.items(), key=lambda item: -item[1]):
        yield f"           {_time(seconds)}  {seconds / timeline.seconds:5.1%}  {KINDS[kind]}"
    for why, seconds in sorted(timeline.idle.items(), key=lambda item: -item[1]):
        if seconds >= 0.001 * timeline.seconds:
            yield f"           {_time(seconds)}  {seconds / timeline.seconds:5.1%}  waiting for {why}"
    yield from _wire(found, timeline)
    yield from _bus(timeline)
    waits = Counter((wait.reason, wait.phase) for wait in found.host_waits())
    told = ", ".join(
        f"{times:,} {phase if phase == BEHIND else 'in ' + phase} ({reason})"
        for (reason, phase), times in waits.items()
    )
    yield f"host       waits for the device {sum(waits.values()):,} times a step" + (f": {told}" if told else "")
    yield (
        f"           launches for {_time(timeline.launching).strip()} of the step; the device waits "
        f"{_time(timeline.idle.get('host', 0.0)).strip()} for it"
    )


def _bus(timeline: Timeline) -> Iterator[str]:
    """Of activations that wait on the host: what moves on streams of its own."""
    for name in (TO_HOST, FROM_HOST):
        spans = [span for span in timeline.spans if span.name == name and span.stream not in (MAIN, CHECKPOINT)]
        if spans:
            seconds = sum(span.seconds for span in spans)
            moved = sum(span.entry.bytes for span in spans if isinstance(span.entry, Kernel))
            shown = timeline.idle.get(name, 0.0)
            yield (
                f"bus        {_bytes(moved).strip()} of activations, {name}: {_time(seconds).strip()}, "
                f"{max(1 - shown / seconds, 0.0):.0%} hidden"
            )


def _wire(found: Rehearsal, timeline: Timeline) -> Iterator[str]:
    times: Counter[str] = Counter()
    sent: dict[str, int] = defaultdict(int)
    for entry in found.whole():
        if isinstance(entry, Collective) and len(entry.ranks) > 1:
            label = f"{entry.name}, {entry.group}"
            times[label] += 1
            sent[label] += entry.sent
    yield f"wire       {_bytes(sum(sent.values())).strip()} sent a step"
    for label, total in sorted(sent.items(), key=lambda item: -item[1]):
        seconds, shown = timeline.wire[label], timeline.idle.get(label, 0.0)
        yield (
            f"           {_bytes(total)}  {times[label]:6,} x {label}: {_time(seconds).strip()}, "
            f"{max(1 - shown / seconds, 0.0):.0%} hidden"
        )
