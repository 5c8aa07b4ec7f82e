"""When everything on a tape would happen, by a chip's rates: streams run side by side, and wait where the program says so.

The host launches in order, `launch_us` apiece, and stands still where it reads what the device has computed. A kernel takes
the longer of its products and its memory traffic; a collective its latency and its bytes, and runs beside kernels without
slowing them (it takes a few of a GPU's processors: not counted). The compute stream is idle where it waits for a
collective, which then is not hidden, or for the host.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.rehearsal.chips import Chip
from pipeline.rehearsal.tape import MAIN, Await, AwaitMark, Begin, Collective, Entry, HostWait, Kernel, Mark


@dataclass(frozen=True)
class Span:
    """One line of a picture; seconds."""

    name: str
    stream: str
    start: float
    seconds: float
    entry: Entry


@dataclass(frozen=True)
class Timeline:
    spans: tuple[Span, ...]
    seconds: float  # of the step, without what a checkpoint copies behind it
    busy: dict[str, float]  # of the compute stream, by kind of kernel
    wire: dict[str, float]  # of collectives, by name and group, hidden or not
    idle: dict[str, float]  # of the compute stream, by what it waited for: a collective, or the host
    launching: float  # of the host, waits aside: as long as this is less than the step, the device has work


def kernel_seconds(kernel: Kernel, chip: Chip) -> float:
    if kernel.kind == "host_copy":
        return kernel.bytes / (chip.host_copy_gb_s * 1e9)
    moved = kernel.bytes / (chip.memory_tb_s * 1e12)
    rate = (
        "matmul_fp32" if kernel.kind == "own" else kernel.kind
    )  # a kernel of our own computes outside of matrix units
    computed = kernel.flops / (getattr(chip, rate) * 1e12) if kernel.flops else 0.0  # check_chip: there is one
    return max(moved, computed, chip.kernel_us * 1e-6)


def collective_seconds(collective: Collective, chip: Chip) -> float:
    nodes = {rank // chip.gpus_per_node for rank in collective.ranks}
    if len(nodes) <= 1:
        return chip.node_latency_us * 1e-6 + collective.sent / (chip.node_gb_s * 1e9)
    return chip.network_latency_us * 1e-6 + collective.sent / (chip.network_gb_s * 1e9)


def simulate(entries: Sequence[Entry], chip: Chip) -> Timeline:
    at: dict[str, float] = defaultdict(float)  # how far each stream is
    cause: dict[str, str] = {}  # what a stream did last
    ended: dict[int, tuple[float, str]] = {}  # collectives and marks
    spans: list[Span] = []
    busy: dict[str, float] = defaultdict(float)
    wire: dict[str, float] = defaultdict(float)
    idle: dict[str, float] = defaultdict(float)
    host = launching = 0.0

    def await_(stream: str, number: int) -> None:
        when, why = ended.get(number, (0.0, ""))
        if when > at[stream]:
            waiting[stream] = (when, why)
            at[stream] = when

    waiting: dict[str, tuple[float, str]] = {}
    worked_until = 0.0  # of the compute stream
    for entry in entries:
        match entry:
            case Kernel():
                host += chip.launch_us * 1e-6
                launching += chip.launch_us * 1e-6
                start = max(at[entry.stream], host)
                seconds = kernel_seconds(entry, chip)
                if entry.stream == MAIN:
                    if start > worked_until:
                        awaited, why = waiting.get(MAIN, (0.0, ""))
                        for_wire = max(min(awaited, start) - worked_until, 0.0)
                        idle[why or "host"] += for_wire
                        idle["host"] += start - worked_until - for_wire
                    busy[entry.kind] += seconds
                    worked_until = start + seconds
                at[entry.stream] = start + seconds
                cause[entry.stream] = entry.name
                spans.append(Span(entry.name, entry.stream, start, seconds, entry))
            case Collective():
                host += chip.launch_us * 1e-6
                launching += chip.launch_us * 1e-6
                start = max(at[entry.own_stream], at[entry.stream], host)
                seconds = collective_seconds(entry, chip)
                at[entry.own_stream] = start + seconds
                label = f"{entry.name}, {entry.group}"
                wire[label] += seconds
                ended[entry.number] = (start + seconds, label)
                spans.append(Span(entry.name, entry.own_stream, start, seconds, entry))
            case Await(stream, number):
                await_(stream, number)
                if number in ended:
                    cause[stream] = ended[number][1]
            case Mark(number, stream):
                ended[number] = (at[stream], cause.get(stream, ""))
            case AwaitMark(stream, number):
                await_(stream, number)
            case HostWait(_, stream):
                host = max(host, at[stream]) + chip.host_wait_us * 1e-6
                spans.append(
                    Span(entry.reason, "host", host - chip.host_wait_us * 1e-6, chip.host_wait_us * 1e-6, entry)
                )
            case Begin():
                pass
    step = [s.start + s.seconds for s in spans if getattr(s.entry, "phase", "") != "checkpoint"]
    return Timeline(
        tuple(spans), max(step, default=0.0), dict(busy), dict(wire), {k: v for k, v in idle.items() if v > 0}, launching
    )  # fmt: skip
