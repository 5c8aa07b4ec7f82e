"""What it costs to know where a step's time goes (pipeline/training/phases.py), on gloo ranks.

    python -m benchmarks.phases [--ranks 2] [--steps 12]

The demo's network and batch, random tokens; steps that are measured and steps that are not in turn, on the same ranks. CPU seconds of all
ranks together, medians; and, as that difference drowns in a busy machine's noise, what is done more: marks, and what a mark and
sharing the times take by themselves.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config.load import load_config
from pipeline.parallel.exposed import HostClock
from pipeline.parallel.mesh import build_meshes
from pipeline.training.batches import MicroBatch, StepBatch
from pipeline.training.guard import Guard
from pipeline.training.phases import Stopwatch
from pipeline.training.step import Step
from pipeline.training.times import TimesOfRanks
from pipeline.training.trainer import build

TARGET = 1.01


class Counted(HostClock):
    """Counts marks."""

    marks = 0

    def mark(self) -> float:
        self.marks += 1
        return super().mark()


def rank_of(rank: int, ranks: int, steps: int, store: str, answers: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    config = load_config("debug", [f"parallelism={{shard: {ranks}, ep: {ranks}}}"])
    device, training = torch.device("cpu"), config.training
    meshes = build_meshes(config.parallelism, "cpu")
    model, optimizer = build(config, meshes, device)
    step = Step(model, optimizer, Guard(device), meshes, config.optimizer, device)
    generator = torch.Generator().manual_seed(rank)
    shape = (training.micro_batch, training.sequence_length)
    micro_batches = []
    for _ in range(config.schedule.global_batch[0].sequences // (ranks * training.micro_batch)):
        tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
        micro_batches.append(MicroBatch(tokens, tokens, [training.sequence_length] * training.micro_batch, None))
    batch = StepBatch(micro_batches, sum(micro.labels_BS.numel() for micro in micro_batches))

    clock = Counted()
    stopwatch = Stopwatch(device, meshes.exposed)
    stopwatch._clock = clock
    told = TimesOfRanks(ranks)
    seconds: dict[str, list[float]] = {"plain": [], "measured": []}
    extra: list[float] = []
    for number in range(1, 2 * steps + 3):
        kind = "measured" if number % 2 else "plain"
        dist.barrier()
        start = time.process_time()
        if kind == "plain":
            meshes.exposed._clock = None
            step.before_update = lambda: None
            step(batch, 1e-4, 0.0, False)
        else:
            stopwatch.begin()
            stopwatch.enter("data")
            stopwatch.enter("compute")
            step.before_update = lambda: stopwatch.enter("optimizer")
            figures = step(batch, 1e-4, 0.0, False, None, stopwatch.take()[0])
            stopwatch.lap(number)
            at = time.process_time()
            stopwatch.read(number)
            told.add((number,), figures.tolist()[-7 * ranks :])
            told.take()
            extra.append(time.process_time() - at)
        seconds[kind].append(time.process_time() - start)
    at = time.process_time()
    for _ in range(10_000):
        clock.mark()
    answers.put((seconds, (clock.marks - 10_000) / (steps + 1), (time.process_time() - at) / 10_000, extra))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    given = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = given.ranks, given.steps, f"{folder}/store", answers
        processes = [spawn.Process(target=rank_of, args=(rank, *arguments)) for rank in range(given.ranks)]
        for process in processes:
            process.start()
        found = [answers.get(timeout=900) for _ in processes]
        for process in processes:
            process.join()
    plain, measured = (
        sum(statistics.median(each[0][kind][1:]) for each in found) / given.ranks for kind in ("plain", "measured")
    )
    marks, each = found[0][1], found[0][2]
    more = marks * each + statistics.median(found[0][3])
    print(
        f"{given.ranks} ranks: {plain:.3f} CPU-s a step and rank, {measured:.3f} measured: {measured / plain:.4f} times; "
        f"{marks:.0f} marks of {each * 1e6:.2f} us and {statistics.median(found[0][3]) * 1e6:.0f} us to read and tell: "
        f"{more / plain:.3%} of a step"
    )
    result = {"benchmark": "phases", "ours": measured, "peer": plain, "ratio": round(1 + more / plain, 5)}
    print(
        json.dumps(
            {
                **result,
                "measured_ratio": round(measured / plain, 4),
                "target": TARGET,
                "met": 1 + more / plain <= TARGET,
            }
        )
    )


if __name__ == "__main__":
    main()
