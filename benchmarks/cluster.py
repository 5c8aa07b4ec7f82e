"""One training step on several GPUs at every degree of expert parallelism: speed, what of the exchange is hidden, the same loss.

    python -m benchmarks.cluster [--layers 9] [--steps 5]   # all GPUs of this machine; torchrun, for several machines or fewer GPUs
    python -m benchmarks.cluster --tiny                     # four gloo ranks: figures mean nothing

The trainer's own step (FSDP2, experts spread, Muon) on random tokens, with Moonlight's layers at full width, as many as asked
for; at most eight ranks to a shard, further ones are copies; two micro-batches a rank. Compiled, selective checkpointing. For each ep that
divides a shard, and for each way that rows travel there (`training.expert_splits`: equal parts, or splits read on the device where NVSHMEM
connects the ranks; where not, a line says why), a model is built, one step warms up, and medians follow: tokens/s a GPU, MFU
(pipeline/training/flops.py; neither optimizer nor anything computed twice counts), what the slowest rank waited for exchanges of rows by marks on its device (pipeline/parallel/exposed.py),
and the same once more with each exchange awaited where it is launched. Hidden is what the former waits less than the latter. Waits of the
host in a step are counted by the profiler, the one behind it included. The first loss must be that of ep 1: same weights, same tokens; and that of
both ways the same to the last bit. How it scales: the same command on other numbers of GPUs.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.arguments import on_ranks, positive
from benchmarks.gpu import host_waits
from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig
from pipeline.model.block import Block
from pipeline.model.experts import MoE
from pipeline.parallel import symmetric
from pipeline.parallel.bounded import BoundedDispatch
from pipeline.parallel.device_flight import Leg, Wire
from pipeline.parallel.dispatch import AllToAllDispatch, Dispatcher
from pipeline.parallel.exposed import Exposed, clock_of
from pipeline.parallel.flight import Flight
from pipeline.parallel.mesh import build_meshes
from pipeline.training.batches import MicroBatch, StepBatch, labels_of
from pipeline.training.flops import flops_per_token, peak_flops
from pipeline.training.guard import Guard
from pipeline.training.step import Step
from pipeline.training.trainer import build

MICRO_BATCHES = 2
RANKS = 4  # of --tiny
LOSS_MAY_DIFFER = {"bf16": 2e-2, "fp32": 1e-5}  # at another ep: sums in another order


class Measured(NamedTuple):
    seconds: float  # of a step
    waited: float  # for exchanges of rows, in a step
    blocking: float  # the same with nothing behind an exchange
    loss: float  # of the first step
    host_waits: float  # in a step and behind it


def config_for(world: int, ep: int, splits: str, layers: int, tiny: bool) -> RunConfig:
    shard = min(world, 8)
    once = "true" if ep == shard else "false"  # else whole gradients of all experts would have to fit
    overrides = [
        f"parallelism.shard={shard}", f"parallelism.replicate={world // shard}", f"parallelism.ep={ep}",
        f"schedule.global_batch=[{{until: 100%, sequences: {MICRO_BATCHES * world}}}]", "training.micro_batch=1",
        f"training.gather_once={once}", "training.expert_capacity=1.25", f"training.expert_splits={splits}",
    ]  # fmt: skip
    if tiny:  # of the debug preset
        return load_config("debug", [*overrides, "training.sequence_length=128", "model.num_hidden_layers=2"])
    return load_config("moonlight-16b-a3b", [*overrides, f"model.num_hidden_layers={layers}"])


def batch_of(config: RunConfig, rank: int) -> StepBatch:
    length = config.training.sequence_length
    draw = torch.Generator().manual_seed(rank)
    micro_batches = []
    for _ in range(MICRO_BATCHES):
        tokens_BS = torch.randint(0, config.model.vocab_size, (1, length), generator=draw)
        micro_batches.append(MicroBatch(tokens_BS, labels_of(tokens_BS, [[length]], False), [length], None))
    return StepBatch(micro_batches, MICRO_BATCHES * (length - 1))


def awaited(flight: Flight, *arguments: Any) -> Any:
    """`Flight._start` without anything behind it."""
    arriving = START(flight, *arguments)
    flight.finish()
    return arriving


def awaited_too(wire: Wire, *arguments: Any) -> Leg:
    """`Wire.launch` likewise."""
    leg = LAUNCH(wire, *arguments)
    wire.land(leg)
    return leg


START, LAUNCH = Flight._start, Wire.launch


def watch(dispatcher: Dispatcher, exposed: Exposed) -> None:
    """Count what it waits for exchanges of rows."""
    if isinstance(dispatcher, AllToAllDispatch | BoundedDispatch):
        dispatcher.exposed = exposed
    if isinstance(dispatcher, BoundedDispatch):
        watch(dispatcher.fitting, exposed)
        if dispatcher.wire is not None:
            dispatcher.wire.exposed = exposed


def measure(config: RunConfig, device: torch.device, steps: int) -> Measured:
    meshes = build_meshes(config.parallelism, device.type)
    model, optimizer = build(config, meshes, device)
    once = config.training.gather_once
    step = Step(model, optimizer, Guard(device), meshes, config.optimizer, device, gather_once=once)
    exposed, clock = Exposed(), clock_of(device)
    for block in model.layers:
        assert isinstance(block, Block)
        if isinstance(block.mlp, MoE):
            watch(block.mlp.experts.dispatcher, exposed)
    batch = batch_of(config, meshes.rank)
    first_loss = float(step(batch, 1e-4, 1e-3, False)[0])
    waits = host_waits(lambda: step(batch, 1e-4, 1e-3, False), device)
    exposed.start(clock)
    seconds: dict[str, list[float]] = {"plain": [], "blocking": []}
    waited: dict[str, list[float]] = {"plain": [], "blocking": []}
    for _ in range(steps):
        for way in seconds:
            with ExitStack() as stack:
                if way == "blocking":
                    stack.enter_context(mock.patch.object(Flight, "_start", awaited))
                    stack.enter_context(mock.patch.object(Wire, "launch", awaited_too))
                dist.barrier()
                start = time.perf_counter()
                step(batch, 1e-4, 1e-3, False).tolist()  # the device has finished
                seconds[way].append(time.perf_counter() - start)
            waited[way].append(sum(clock.seconds(*span) for span in exposed.take()))
    found = [statistics.median(times) for times in (seconds["plain"], waited["plain"], waited["blocking"])]
    slowest = torch.tensor(found, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return Measured(*slowest.tolist(), first_loss, waits)


def report(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    world, rank = dist.get_world_size(), dist.get_rank()
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = peak_flops(chip)
    if rank == 0:
        print(f"{world} ranks, {chip}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}", flush=True)
    records: list[dict[str, Any]] = []
    losses: dict[int, float] = {}
    for ep in (ep for ep in (1, 2, 4, 8) if min(world, 8) % ep == 0):
        for splits in splits_of(ep, world, arguments, device):
            config = config_for(world, ep, splits, arguments.layers, arguments.tiny)
            found = measure(config, device, arguments.steps)
            torch.compiler.reset()
            gc.collect()
            other = losses.setdefault(ep, found.loss)
            speed = MICRO_BATCHES * config.training.sequence_length / found.seconds
            share = speed * flops_per_token(config.model, config.training.sequence_length) / peak
            mfu = None if math.isnan(share) else share
            hidden = 1 - found.waited / found.blocking if found.blocking else None
            may = LOSS_MAY_DIFFER["bf16" if device.type == "cuda" else "fp32"]
            same = abs(found.loss - losses[1]) <= may * abs(losses[1]) and found.loss == other
            if rank == 0:
                told = (
                    "no exchange"
                    if hidden is None
                    else f"waits {found.waited * 1e3:.1f} ms for rows, {hidden:.0%} hidden"
                )
                print(
                    f"ep {ep} {splits:6}{found.seconds * 1e3:10.1f} ms a step{speed:10.0f} tokens/s a GPU, "
                    f"MFU {f'{mfu:.1%}' if mfu is not None else '?'}, {told}, {found.host_waits:.0f} waits of the host, loss {found.loss:.4f}"
                    f"{'' if same else ' NOT THAT OF EP 1, OR OF THE OTHER WAY'}",
                    flush=True,
                )
            records.append(
                {
                    "benchmark": f"cluster/{world}/ep{ep}/{splits}", "ours": speed, "peer": None, "ratio": None, "target": None, "met": same,
                    "unit": "tokens/s a GPU; met: the loss is that of ep 1", "mfu": mfu, "hidden": hidden, "loss": found.loss,
                    "host_waits": found.host_waits,
                }
            )  # fmt: skip
    return records


def splits_of(ep: int, world: int, arguments: argparse.Namespace, device: torch.device) -> list[str]:
    """The ways that rows can travel between ep ranks here."""
    if ep == 1:
        return ["equal"]
    config = config_for(world, ep, "equal", arguments.layers, arguments.tiny)
    group = build_meshes(config.parallelism, device.type).sparse
    assert group is not None
    missing = symmetric.missing(device, group["ep"].get_group(), config.model.hidden_size * 2)
    if missing and dist.get_rank() == 0:
        print(f"ep {ep} device skipped: {missing}", flush=True)
    return ["equal"] if missing else ["equal", "device"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=positive, default=9, help="of the real model's 27")
    parser.add_argument("--steps", type=positive, default=5)
    parser.add_argument("--tiny", action="store_true", help="the debug preset on gloo ranks")
    arguments = parser.parse_args()
    if arguments.tiny:
        device = torch.device("cpu")
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU here; --tiny runs through on gloo ranks")
    on_ranks("benchmarks.cluster", RANKS if arguments.tiny else torch.cuda.device_count())
    dist.init_process_group("gloo" if arguments.tiny else "cpu:gloo,cuda:nccl")
    if not arguments.tiny:
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
    records = report(arguments, device)
    rank = dist.get_rank()
    dist.destroy_process_group()
    if rank == 0:
        print(json.dumps(records))


if __name__ == "__main__":
    main()
