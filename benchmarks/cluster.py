"""One training step on several GPUs at every degree of expert parallelism: speed, what of the exchange is hidden, the same loss.

    python -m benchmarks.cluster [--layers 9] [--steps 5]   # all GPUs of this machine; torchrun, for several machines or fewer GPUs
    python -m benchmarks.cluster --tiny                     # four gloo ranks: figures mean nothing

The trainer's own step (FSDP2, experts spread, Muon) on random tokens, with Moonlight's layers at full width, as many as asked
for; at most eight ranks to a shard, further ones are copies; two micro-batches a rank. Compiled, selective checkpointing. For each ep that
divides a shard a model is built, one step warms up, and medians follow: tokens/s a GPU, MFU (pipeline/training/flops.py; neither optimizer nor
anything computed twice counts), what the slowest rank waited for exchanges of rows by marks on its device (pipeline/parallel/exposed.py),
and the same once more with each exchange awaited where it is launched. Hidden is what the former waits less than the latter. The first
loss must be that of ep 1: same weights, same tokens. How it scales: the same command on other numbers of GPUs.
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
from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig
from pipeline.model.block import Block
from pipeline.model.experts import MoE
from pipeline.parallel.dispatch import AllToAllDispatch
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


def config_for(world: int, ep: int, layers: int, tiny: bool) -> RunConfig:
    shard = min(world, 8)
    once = "true" if ep == shard else "false"  # else whole gradients of all experts would have to fit
    overrides = [
        f"parallelism.shard={shard}", f"parallelism.replicate={world // shard}", f"parallelism.ep={ep}",
        f"schedule.global_batch=[{{until: 100%, sequences: {MICRO_BATCHES * world}}}]", "training.micro_batch=1",
        f"training.gather_once={once}",
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


START = Flight._start


def measure(config: RunConfig, device: torch.device, steps: int) -> Measured:
    meshes = build_meshes(config.parallelism, device.type)
    model, optimizer = build(config, meshes, device)
    once = config.training.gather_once
    step = Step(model, optimizer, Guard(device), meshes, config.optimizer, device, gather_once=once)
    exposed, clock = Exposed(), clock_of(device)
    for block in model.layers:
        assert isinstance(block, Block)
        if isinstance(block.mlp, MoE) and isinstance(block.mlp.experts.dispatcher, AllToAllDispatch):
            block.mlp.experts.dispatcher.exposed = exposed
    batch = batch_of(config, meshes.rank)
    first_loss = float(step(batch, 1e-4, 1e-3, False)[0])
    exposed.start(clock)
    seconds: dict[str, list[float]] = {"plain": [], "blocking": []}
    waited: dict[str, list[float]] = {"plain": [], "blocking": []}
    for _ in range(steps):
        for way in seconds:
            with ExitStack() as stack:
                if way == "blocking":
                    stack.enter_context(mock.patch.object(Flight, "_start", awaited))
                dist.barrier()
                start = time.perf_counter()
                step(batch, 1e-4, 1e-3, False).tolist()  # the device has finished
                seconds[way].append(time.perf_counter() - start)
            waited[way].append(sum(clock.seconds(*span) for span in exposed.take()))
    found = [statistics.median(times) for times in (seconds["plain"], waited["plain"], waited["blocking"])]
    slowest = torch.tensor(found, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return Measured(*slowest.tolist(), first_loss)


def report(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    world, rank = dist.get_world_size(), dist.get_rank()
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = peak_flops(chip)
    if rank == 0:
        print(f"{world} ranks, {chip}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}", flush=True)
    records: list[dict[str, Any]] = []
    losses: dict[int, float] = {}
    for ep in (ep for ep in (1, 2, 4, 8) if min(world, 8) % ep == 0):
        config = config_for(world, ep, arguments.layers, arguments.tiny)
        found = measure(config, device, arguments.steps)
        torch.compiler.reset()
        gc.collect()
        losses[ep] = found.loss
        speed = MICRO_BATCHES * config.training.sequence_length / found.seconds
        share = speed * flops_per_token(config.model, config.training.sequence_length) / peak
        mfu = None if math.isnan(share) else share
        hidden = 1 - found.waited / found.blocking if found.blocking else None
        may = LOSS_MAY_DIFFER["bf16" if device.type == "cuda" else "fp32"]
        same = abs(found.loss - losses[1]) <= may * abs(losses[1])
        if rank == 0:
            told = (
                "no exchange" if hidden is None else f"waits {found.waited * 1e3:.1f} ms for rows, {hidden:.0%} hidden"
            )
            print(
                f"ep {ep}{found.seconds * 1e3:10.1f} ms a step{speed:10.0f} tokens/s a GPU, "
                f"MFU {f'{mfu:.1%}' if mfu is not None else '?'}, {told}, loss {found.loss:.4f}{'' if same else ' NOT THAT OF EP 1'}",
                flush=True,
            )
        records.append(
            {
                "benchmark": f"cluster/{world}/ep{ep}", "ours": speed, "peer": None, "ratio": None, "target": None, "met": same,
                "unit": "tokens/s a GPU; met: the loss is that of ep 1", "mfu": mfu, "hidden": hidden, "loss": found.loss,
            }
        )  # fmt: skip
    return records


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
