"""What a step costs that is computed a second time with the ranks exchanged (`training.recompute_every`), on gloo ranks.

    python -m benchmarks.recompute [--ranks 2] [--steps 6]

The demo's network and batch, random tokens, plain and recomputed steps in turn on the same ranks. CPU seconds of all ranks together, medians.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config.load import load_config
from pipeline.parallel.mesh import build_meshes
from pipeline.training.batches import MicroBatch, StepBatch
from pipeline.training.guard import Guard
from pipeline.training.recompute import Recomputation
from pipeline.training.step import Step
from pipeline.training.trainer import build


def rank_of(rank: int, ranks: int, steps: int, store: str, answers: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    config = load_config("debug", [f"parallelism={{shard: {ranks}}}"])
    device, training = torch.device("cpu"), config.training
    meshes = build_meshes(config.parallelism, "cpu")
    model, optimizer = build(config, meshes, device)
    step = Step(model, optimizer, Guard(device), meshes, config.optimizer, device)
    check = Recomputation(model, 1, 1, device)
    generator = torch.Generator().manual_seed(rank)
    shape = (training.micro_batch, training.sequence_length)
    micro_batches = []
    for _ in range(config.schedule.global_batch[0].sequences // (ranks * training.micro_batch)):
        tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
        micro_batches.append(MicroBatch(tokens, tokens, [training.sequence_length] * training.micro_batch, None))
    batch = StepBatch(micro_batches, sum(micro.labels_BS.numel() for micro in micro_batches))
    seconds: dict[str, list[float]] = {"plain": [], "recomputed": []}
    for number in range(1, steps + 2):
        for kind, found in seconds.items():
            recompute = partial(check, number) if kind == "recomputed" else None
            dist.barrier()
            start = time.process_time()
            step(batch, 1e-4, 0.0, False, recompute)
            found.append(time.process_time() - start)
    answers.put(seconds)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    given = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = given.ranks, given.steps, f"{folder}/store", answers
        processes = [spawn.Process(target=rank_of, args=(rank, *arguments)) for rank in range(given.ranks)]
        for process in processes:
            process.start()
        found = [answers.get(timeout=600) for _ in processes]
        for process in processes:
            process.join()
    medians = {kind: sum(statistics.median(each[kind][1:]) for each in found) for kind in ("plain", "recomputed")}
    print(
        f"{given.ranks} ranks: {medians['plain']:.2f} CPU-s a step, {medians['recomputed']:.2f} recomputed: "
        f"{medians['recomputed'] / medians['plain']:.2f} times"
    )


if __name__ == "__main__":
    main()
