"""A rehearsal against real process groups, and against the planner."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig
from pipeline.model.shapes import parameter_shapes
from pipeline.optim.schedule import segments
from pipeline.parallel.mesh import build_meshes
from pipeline.planner.estimate import Hardware, estimate
from pipeline.planner.sizes import sizes_of
from pipeline.rehearsal.chips import load_chip
from pipeline.rehearsal.recorder import FROM_HOST, TO_HOST, UNIT
from pipeline.rehearsal.step import BEHIND, CHECKPOINT, _batch
from pipeline.rehearsal.tape import MAIN, Await, AwaitMark, Collective, HostWait, Kernel, Mark
from pipeline.rehearsal.timeline import simulate
from pipeline.training.flops import flops_per_token
from pipeline.training.guard import Guard
from pipeline.training.step import Step
from pipeline.training.times import VALUES
from pipeline.training.trainer import build
from tests.distributed import run_distributed
from tests.rehearsal.rehearsals import MESHES, Launched, Seen, launched, rehearsed, small


def _really(config: RunConfig) -> list[tuple[str, int, int]]:
    cpu = torch.device("cpu")
    meshes = build_meshes(config.parallelism, "cpu")
    model, optimizer = build(config, meshes, cpu)
    once = config.training.gather_once
    step = Step(model, optimizer, Guard(cpu), meshes, config.optimizer, cpu, gather_once=once)
    in_all = segments(config.schedule, config.training.sequence_length)[-1].sequences // config.parallelism.world_size
    batch = _batch(config, in_all)
    labels = torch.tensor(batch.labels)
    with Launched() as wire:
        loss, aux_loss = step.forward_backward(batch.micro_batches, labels, labels)
        step.update(loss, aux_loss, labels, 1e-4, 1e-3, False, [0.0] * VALUES)
    return wire.found


@pytest.mark.parametrize(
    "mesh", [pytest.param(mesh, marks=[] if mesh == "ep 2 x efsdp 2" else pytest.mark.long) for mesh in MESHES]
)
def test_collectives_are_those_of_real_ranks(mesh: str) -> None:
    """Name, order, bytes to the byte and size of the group, in bf16 with recomputation and as it is without."""
    config = small(
        mesh, training__compute_dtype="bf16", training__activation_checkpointing="full", optimizer__qk_clip=100.0
    )
    real = run_distributed(_really, 4, config)[0]
    assert launched(rehearsed(config).whole) == real
    assert len(real) > 30


def test_measuring_a_step_waits_for_nothing() -> None:
    """Every mark of the phases and of exposed communication is on the tape; the host waits for token counts alone, or for nothing."""
    counts = rehearsed(small("ep 2 x efsdp 2", training__compute_dtype="bf16"))
    marks = [entry for entry in counts.run if isinstance(entry, Mark)]
    assert len(marks) > 100
    micro_batches, layers = 2, 1  # that route
    assert counts.host_waits == micro_batches * layers
    fixed = rehearsed(small("ep 2 x efsdp 2", training__compute_dtype="bf16", **EQUAL))
    assert fixed.host_waits == 1  # behind the step, to know whether it happened
    assert waits_in_step(fixed) == []


def waits_in_step(found: Seen) -> list[HostWait]:
    return [entry for entry in found.whole if isinstance(entry, HostWait) and entry.phase != BEHIND]


def test_the_preset_waits_for_nothing_and_sends_the_rows_that_are_there() -> None:
    """Of fewer layers, in one configuration: no wait of the host in a step, and of d93106a's bytes, when a row travelled for each choice, at
    most 0.78, at ep 8, K 6, E 64. The planner knows both."""
    config = load_config("moonlight-16b-a3b", ["model.num_hidden_layers=3", "parallelism.replicate=1"])
    model, ep = config.model, config.parallelism.ep
    assert (ep, model.num_experts_per_tok, model.n_routed_experts, config.training.expert_capacity) == (8, 6, 64, 1.25)
    found, planned = rehearsed(config), estimate(config, Hardware())
    assert found.host_waits == 1
    assert waits_in_step(found) == []
    sent = sum(entry.sent for entry in found.whole if isinstance(entry, Collective) and entry.name == "all_to_all_vdev")
    tokens = found.tokens * (model.num_hidden_layers - model.first_k_dense_replace)
    before = 4 * tokens * model.num_experts_per_tok * model.hidden_size * 2 * (ep - 1) // ep
    assert 0.75 * before < sent <= 0.78 * before
    assert sent == pytest.approx(planned.traffic.tokens, rel=1e-3)
    equal = estimate(load_config("moonlight-16b-a3b", ["training.expert_splits=equal"]), Hardware())
    whole = estimate(load_config("moonlight-16b-a3b", []), Hardware())
    assert equal.traffic.tokens == pytest.approx(1.25 * whole.traffic.tokens, rel=1e-3)
    assert equal.memory.symmetric == 0
    assert whole.memory.peak - equal.memory.peak == whole.memory.symmetric > 0


EQUAL, DEVICE = ({"training__expert_capacity": 2.0, "training__expert_splits": splits} for splits in ("equal", "auto"))


@pytest.mark.parametrize("way", [pytest.param(EQUAL, marks=pytest.mark.long), DEVICE], ids=["equal", "device"])
def test_rows_travel_behind_the_other_half_of_the_micro_batch(way: dict[str, Any]) -> None:
    """Between the launch of an exchange and its end lie products of the other half, in both directions, or at least the shared
    experts'; without halves some have nothing but the latter."""

    def hidden(**settings: Any) -> Counter[str]:
        micro = {"training__micro_batch": 2, "training__compute_dtype": "bf16"}
        found = rehearsed(small("ep 2 x efsdp 2", **micro, **way, **settings))
        work: Counter[str] = Counter()
        under_way: dict[int, set[str]] = {}
        ended: dict[str, set[int]] = {}  # before what a stream does next
        marks: dict[int, set[int]] = {}

        def land(numbers: set[int]) -> None:
            for kinds in [under_way.pop(number) for number in numbers & under_way.keys()]:
                if kinds & {"grouped", "attention_forward", "attention_backward"}:
                    work["experts or attention"] += 1
                else:
                    work["shared experts" if kinds else "nothing"] += 1

        for entry in found.run:
            if isinstance(entry, Collective) and entry.name.startswith("all_to_all") and entry.phase != "optimizer":
                under_way[entry.number] = set()
            elif isinstance(entry, Await):
                ended.setdefault(entry.stream, set()).add(entry.number)
                if entry.stream == MAIN:
                    land({entry.number})
            elif isinstance(entry, Mark):
                marks[entry.number] = set(ended.get(entry.stream, ()))
            elif isinstance(entry, AwaitMark) and entry.stream == MAIN:
                land(marks[entry.number])
            elif isinstance(entry, Kernel) and entry.kind not in ("memory", "own"):
                for kinds in under_way.values():
                    kinds.add(entry.kind)
        assert not under_way
        return work

    # of a layer: rows and what they weigh there, results back, and the gradients of all three
    assert hidden() == {"shared experts": 4, "experts or attention": 2}
    assert hidden(training__interleave=True) == {"shared experts": 2, "experts or attention": 10}


def test_room_that_is_empty_costs_no_work() -> None:
    """Of buffers of fixed size only memory and the wire are more; products of experts and kernels of our own see the rows alone."""

    def work(**settings: float) -> Counter[str]:
        found = rehearsed(small("ep 2 x efsdp 2", training__compute_dtype="bf16", **settings))
        flops: Counter[str] = Counter()
        for entry in found.run:
            if not isinstance(entry, Kernel):
                continue
            if entry.kind == "grouped" or entry.name in ("bag_sums", "bag_sums_into", "swiglu_backward"):
                flops[entry.name] += entry.flops
            elif entry.name in ("copy_rows", "copy_rows_into"):
                flops[entry.name] += sum(size for _, size in entry.writes)
        return flops

    fitting = work()
    assert work(**EQUAL) == fitting
    on_device = work(**DEVICE)
    assert on_device["copy_rows_into"] > 0
    copied = on_device.pop("copy_rows_into") + on_device.pop("copy_rows")
    assert on_device.pop("bag_sums") + on_device.pop("bag_sums_into") == fitting.pop("bag_sums")
    arrived = copied - fitting.pop("copy_rows")  # and are copied out, for backward
    assert arrived > 0
    assert on_device == fitting


def test_products_in_fp8_are_counted() -> None:
    """Those that rows take part in, two thirds of all, by a rate of their own; rows and weights quantised, the latter once a step where they
    are whole; room that is empty costs nothing here, either."""
    micro_batches, dims = 2, (16, 8)  # of one mixture layer with 4 experts; hidden, width
    rows = 4 * 16  # pairs a micro-batch

    def work(mesh: str, **settings: Any) -> tuple[Counter[str], Counter[tuple[str, str]], list[int]]:
        found = rehearsed(small(mesh, training__compute_dtype="bf16", training__expert_products="fp8", **settings))
        flops: Counter[str] = Counter()
        times: Counter[tuple[str, str]] = Counter()
        wrote: list[int] = []
        for entry in found.run:
            if isinstance(entry, Kernel) and (entry.kind.startswith("grouped") or entry.name.startswith("quantised")):
                flops[entry.kind] += entry.flops
                times[entry.phase, entry.name] += 1
                wrote += [entry.writes[0][1]] if entry.name == "quantised_rows" else []
        return flops, times, wrote

    flops, times, wrote = work("ep 4", training__expert_capacity=2.0)
    one = 2 * micro_batches * rows * dims[0] * dims[1]
    assert flops["grouped_fp8"] == 6 * one
    assert flops["grouped"] == 3 * one
    assert times["forward", "quantised_stacks"] == 3  # gate, up, down
    assert times["backward", "quantised_stacks"] == 2  # gate and up, down
    assert times["forward", "quantised_rows"] == times["backward", "quantised_rows"] == 2 * micro_batches
    # in forward rows and hidden numbers, in backward gradients of results, and of gate and up: a byte each
    assert wrote == [rows * width for width in (dims[0], dims[1], dims[0], 2 * dims[1])] * micro_batches
    cut = work("ep 2 x efsdp 2")[1]
    assert cut["forward", "quantised_stacks"] == 3 * micro_batches
    assert cut["backward", "quantised_stacks"] == 2 * micro_batches


def test_activations_on_the_host_are_counted() -> None:
    """What leaves comes back, on streams of its own, and the host waits for token counts alone, as without."""
    config = small("ep 4", training__activation_checkpointing="full", training__offload_activations=True)
    config = config.model_copy(update={"model": config.model.model_copy(update={"num_hidden_layers": 5})})
    offloaded, micro_batches = rehearsed(config), 2
    assert offloaded.host_waits == 2 * 4 * micro_batches  # in forward, and where it is computed again
    moved: Counter[tuple[str, str]] = Counter()
    for entry in offloaded.run:
        if isinstance(entry, Kernel) and entry.kind == "host_copy" and entry.stream not in (MAIN, CHECKPOINT):
            moved[entry.name, entry.phase] += entry.bytes
    row = config.model.hidden_size * 2  # bytes
    left = micro_batches * 3 * row * config.training.sequence_length  # inputs of blocks, but of the last two
    assert moved == {(TO_HOST, "forward"): left, (FROM_HOST, "backward"): left}
    spans = simulate(offloaded.whole, load_chip("h100")).spans
    assert sum(span.name == FROM_HOST and span.stream != MAIN for span in spans) == micro_batches * 3


@pytest.mark.long
def test_bf16_momentum_is_counted() -> None:
    """Two bytes less an element of this rank's matrices, up to the allocator's units, and as much less copied for a checkpoint."""
    usual, short = (
        rehearsed(small("ep 2 x efsdp 2", optimizer__muon={"momentum_dtype": dtype})) for dtype in ("fp32", "bf16")
    )

    def copied(found: Seen) -> int:
        return sum(entry.bytes for entry in found.run if isinstance(entry, Kernel) and entry.kind == "host_copy")

    config = small("ep 2 x efsdp 2")
    sizes = sizes_of(parameter_shapes(config.model))
    elements = (sizes.total - sizes.by_adamw(config.optimizer)) // config.parallelism.shard
    assert copied(usual) - copied(short) == 2 * elements
    tensors = len(parameter_shapes(config.model))
    assert usual.state_bytes - short.state_bytes == pytest.approx(2 * elements, abs=UNIT * tensors)


def test_a_rehearsal_counts_and_names_the_allocation_without_room() -> None:
    config = small("ep 2 x efsdp 2", training__compute_dtype="bf16")
    found = rehearsed(config)
    kernels = [entry for entry in found.run if isinstance(entry, Kernel)]
    model_flops = sum(k.flops for k in kernels if k.phase in ("forward", "backward") and k.kind != "own")
    micro_batches = 2
    expected = flops_per_token(config.model, 16) * micro_batches * 16
    assert model_flops == pytest.approx(expected, rel=0.05)  # the formula counts no router's gradient of padding
    moves = Counter((k.phase, k.name) for k in kernels)
    # of its one mixture layer: to ranks and to experts, and summed up at both; backward makes the copies for experts again
    for phase, copies in (("forward", 2), ("backward", 3)):
        assert moves[phase, "copy_rows"] == copies * micro_batches
        assert moves[phase, "bag_sums"] == 2 * micro_batches
    assert not {name for _, name in moves} & {"sort", "argsort", "index"}  # nothing else puts rows in another order
    assert found.held_at_peak == found.peak == max(found.by_phase.values())
    assert found.too_much is None
    limit = (found.state_bytes + found.peak) // 2
    holder, size = rehearsed(config, limit).too_much
    assert size > 0
    assert holder.phase in ("forward", "backward", "optimizer")
    assert holder.where
    assert {entry.phase for entry in found.run if isinstance(entry, Collective)} == {"forward", "backward", "optimizer"}


@pytest.mark.long
@pytest.mark.parametrize(
    "mesh",
    [
        ["parallelism.replicate=8"],
        [],
        ["parallelism.replicate=4", "parallelism.shard=64"],
        ["optimizer.muon.momentum_dtype=bf16"],
        ["training.offload_activations=true"],
        ["training.expert_products=fp8"],
        [
            "training.expert_products=fp8",
            "parallelism.shard=64",
            "parallelism.replicate=4",
        ],
        ["training.offload_activations=true", "training.activation_checkpointing=full"],
    ],
    ids=["64", "256", "shard 64", "bf16 momentum", "offloaded", "fp8", "fp8 of cut experts", "inputs offloaded"],
)
def test_the_real_model_agrees_with_the_planner(mesh: list[str]) -> None:
    config = load_config("moonlight-16b-a3b", mesh)
    found, planned = rehearsed(config), estimate(config, Hardware())
    sent = {entry.phase: 0 for entry in found.whole if isinstance(entry, Collective)}
    for entry in found.whole:
        if isinstance(entry, Collective):
            sent[entry.phase] += entry.sent
    assert sum(sent.values()) == pytest.approx(planned.traffic.total, rel=0.05)
    assert found.peak == pytest.approx(planned.memory.peak, rel=0.05)
    timeline = simulate(found.whole, load_chip("h100"))
    assert timeline.launching < timeline.seconds / 2
    assert timeline.idle.get("host", 0.0) < 0.001 * timeline.seconds  # the device never runs out of work


@pytest.mark.long
def test_the_command_prints_and_writes_a_trace(tmp_path: Path) -> None:
    trace = tmp_path / "step.json"
    command = [
        sys.executable,
        "-m",
        "jobs.plan",
        "--config",
        "debug",
        "--rehearse",
        "--chip",
        "b200",
        "--trace",
        str(trace),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines() if not line.startswith(" ")] == [
        "debug:", "rehearsed", "memory", "step", "wire", "host", "trace",
    ]  # fmt: skip
    assert len(json.loads(trace.read_text())["traceEvents"]) > 1000
