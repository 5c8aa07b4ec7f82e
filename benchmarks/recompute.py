"""What a step costs that is computed a second time with the ranks exchanged (`training.recompute_every`), on gloo ranks.

    python -m benchmarks.recompute [--ranks 2] [--steps 6]

The demo's network and batch, random tokens, plain and recomputed steps in turn on the same ranks. CPU seconds of all ranks together, medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial

import torch
import torch.distributed as dist

from benchmarks.arguments import positive
from benchmarks.demo_step import demo_step
from pipeline.training.recompute import Recomputation
from tests.distributed import run_distributed


def times_of_rank(steps: int) -> dict[str, list[float]]:
    """CPU seconds by kind."""
    demo = demo_step(ep=1)
    check = Recomputation(demo.model, 1, 1, torch.device("cpu"))
    seconds: dict[str, list[float]] = {"plain": [], "recomputed": []}
    for number in range(1, steps + 2):
        for kind, found in seconds.items():
            recompute = partial(check, number) if kind == "recomputed" else None
            dist.barrier()
            start = time.process_time()
            demo.step(demo.batch, 1e-4, 0.0, False, recompute)
            found.append(time.process_time() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=positive, default=2)
    parser.add_argument("--steps", type=positive, default=6)
    given = parser.parse_args()
    found = run_distributed(times_of_rank, given.ranks, given.steps, timeout=900.0)
    medians = {kind: sum(statistics.median(each[kind][1:]) for each in found) for kind in ("plain", "recomputed")}
    print(
        f"{given.ranks} ranks: {medians['plain']:.2f} CPU-s a step, {medians['recomputed']:.2f} recomputed: "
        f"{medians['recomputed'] / medians['plain']:.2f} times"
    )


if __name__ == "__main__":
    main()
