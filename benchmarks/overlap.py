"""How much of a slow exchange a step waits for: every exchange of tokens is made to take a fixed time longer.

    python -m benchmarks.overlap [--rounds 5] [--delay-ms 20]

Four gloo ranks (of this machine; torchrun takes others), with experts over all of them, run forward and backward of one network, in turn with exchanges as they are,
delayed (an exchange arrives `delay` after it was launched at the earliest), and delayed and awaited where they are
launched, as if nothing ran meanwhile. The figure is the growth of the slowest rank's step over the delays that it met,
the exchange of counts included, which nothing can hide. Outputs of all three are compared bit by bit. Medians of rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.arguments import on_ranks, positive
from pipeline.config.load import load_config
from pipeline.model.experts import MoE
from pipeline.model.moonlight import Moonlight
from pipeline.parallel.dispatch import AllToAllDispatch

TARGET = 0.40
RANKS = 4
WAYS = ("plain", "delayed", "blocking")


class Delayed:
    """An exchange that takes at least until `due`."""

    def __init__(self, work: Any, due: float) -> None:
        self.work, self.due = work, due

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
        time.sleep(max(0.0, self.due - time.monotonic()))


class Exchanges:
    """`all_to_all_single` with a delay; counts its calls."""

    def __init__(self, way: str, delay: float) -> None:
        self.way, self.delay, self.calls = way, delay, 0
        self.exchange = dist.all_to_all_single

    def __call__(self, *arguments: Any, async_op: bool = False, **named: Any) -> Any:
        self.calls += 1
        due = time.monotonic() + (0.0 if self.way == "plain" else self.delay)
        work = Delayed(self.exchange(*arguments, async_op=async_op, **named), due)
        if not async_op or self.way == "blocking":
            work.wait()
        return work


def model_of_this_rank() -> Moonlight:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "n_routed_experts": 16, "num_experts_per_tok": 2}
    config = load_config("debug").model.model_copy(update={**sizes, "n_shared_experts": 16, "num_hidden_layers": 4})
    model = Moonlight(config)
    for block in model.layers:
        if isinstance(block.mlp, MoE):
            experts = block.mlp.experts
            for name, stack in list(experts.named_parameters()):
                setattr(experts, name, torch.nn.Parameter(stack.detach().chunk(ranks)[rank].clone()))
            experts.dispatcher = AllToAllDispatch(dist.group.WORLD)
    return model


def measure(rounds: int, delay: float) -> dict[str, Any]:
    model = model_of_this_rank()
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids_BS = torch.randint(0, model.config.vocab_size, (2, 512), generator=generator)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    results, calls = {}, 0
    for round_ in range(-1, rounds):  # the first round warms up
        for way in WAYS:
            model.zero_grad()
            with mock.patch.object(dist, "all_to_all_single", Exchanges(way, delay)) as exchanges:
                dist.barrier()
                start = time.monotonic()
                loss = model(ids_BS, ids_BS).loss_sum
                loss.backward()
                dist.barrier()
            calls = exchanges.calls
            if round_ >= 0:
                seconds[way].append(time.monotonic() - start)
            results[way] = [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    for way in WAYS[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[way], results["plain"], strict=True)), way
    return {"calls": calls, **{way: statistics.median(times) for way, times in seconds.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--delay-ms", type=float, default=20.0)
    arguments = parser.parse_args()
    on_ranks("benchmarks.overlap", RANKS)
    delay = arguments.delay_ms / 1e3
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, measure(arguments.rounds, delay))
    rank = dist.get_rank()
    dist.destroy_process_group()
    if rank > 0:
        return
    found = max(by_rank, key=lambda each: each["delayed"])
    # Weights travel beside their rows, so a layer meets five delays one after the other: counts, and rows four times.
    delays = 5 * 3 * delay
    shares = {way: (found[way] - found["plain"]) / delays for way in WAYS[1:]}
    print(
        f"a step: {found['plain'] * 1e3:.0f} ms; {found['calls']} exchanges, {delays * 1e3:.0f} ms of delays in a row"
    )
    for way, share in shares.items():
        print(f"{way:10}{found[way] * 1e3:8.0f} ms, grown by {share:.0%} of the delays")
    share = round(shares["delayed"], 3)
    result = {
        "benchmark": "overlap/delayed", "ours": share, "peer": round(shares["blocking"], 3), "ratio": share,
        "target": TARGET, "met": share <= TARGET, "unit": "growth of a step over the delays of its exchanges",
    }  # fmt: skip
    print(json.dumps([result]))


if __name__ == "__main__":
    main()
