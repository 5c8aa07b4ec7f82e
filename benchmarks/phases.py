"""What it costs to know where a step's time goes (pipeline/training/phases.py), on gloo ranks.

    python -m benchmarks.phases [--ranks 2] [--steps 12]

The demo's network and batch, random tokens; steps that are measured and steps that are not in turn, on the same ranks. CPU seconds of all
ranks together, medians; and, as that difference drowns in a busy machine's noise, what is done more: marks, and what a mark and
sharing the times take by themselves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
import torch.distributed as dist

from benchmarks.arguments import positive
from benchmarks.demo_step import demo_step
from pipeline.parallel.exposed import HostClock
from pipeline.training.phases import Stopwatch
from pipeline.training.times import TimesOfRanks
from tests.distributed import run_distributed

TARGET = 1.01


class Counted(HostClock):
    """Counts marks."""

    marks = 0

    def mark(self) -> float:
        self.marks += 1
        return super().mark()


def times_of_rank(steps: int) -> tuple[dict[str, list[float]], float, float, list[float]]:
    """CPU seconds by kind, marks a step, seconds of a mark, and seconds of reading and telling the times, a step each."""
    ranks = dist.get_world_size()
    demo = demo_step(ep=ranks)
    step, meshes, batch = demo.step, demo.meshes, demo.batch
    clock = Counted()
    stopwatch = Stopwatch(torch.device("cpu"), meshes.exposed)
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
    return seconds, (clock.marks - 10_000) / (steps + 1), (time.process_time() - at) / 10_000, extra


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=positive, default=2)
    parser.add_argument("--steps", type=positive, default=12)
    given = parser.parse_args()
    found = run_distributed(times_of_rank, given.ranks, given.steps, timeout=900.0)
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
