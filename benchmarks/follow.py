"""Is a follower in training's way?

    python -m benchmarks.follow [--rounds 5]      a step of the demo, its core shared with an evaluator that never rests
    python -m benchmarks.follow --run             a whole training on a local Ray with `evaluation.follow` and without

Training waits for nothing of a follower's (no lock, no reply), so all that one can take is the processor. The first command measures that in
the worst case: as many ranks as cores, and an evaluator that always has something to score. A rank at the niceness of Ray's workers and
an evaluator that has stepped back as it does beside training (jobs/on_ray/task.py) want the same core, and so does, in turns, one of
niceness 19 alone; whoever's turn it is not is stopped. Told are CPU seconds of a step (more where the caches are the evaluator's, too) and the rank's share
of what both got: its inverse is how much longer a step lasts. Both hold on a busy machine, whose other programs take from both.

The second needs an idle machine: it prints the median seconds a step, from one checkpoint to the next, of both runs. The follower judges every second step, far
more than anybody would.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.arguments import positive
from benchmarks.demo_step import demo_step
from jobs.on_ray.task import step_back
from pipeline.config.load import load_config
from pipeline.model.moonlight import Moonlight
from tests.distributed import run_distributed

RAYS_WORKERS = 15  # their niceness, by Ray's default
WINDOWS = 4  # that an evaluator scores at once
TARGET = 0.9  # of the core
STEPS, EVERY = 24, 2
SETTINGS = [
    f"schedule.total_tokens={STEPS * 8192}",
    f"checkpoint.every_steps={EVERY}",
    "checkpoint.keep=100",
    "evaluation.max_tokens_per_source=20000",
    "publishing.beats_frequencies=false",
    "publishing.sample_prompts=[]",
]


# -- one core ----------------------------------------------------------------------------------------------------------


def nice_alone() -> None:
    os.nice(19)


def score_for_ever(behind: Callable[[], None], ready: Event) -> None:
    behind()
    torch.set_num_threads(1)
    config = load_config("debug").model
    model = Moonlight(config).eval().requires_grad_(False)
    tokens_BS = torch.randint(config.vocab_size, (WINDOWS, 512), generator=torch.Generator().manual_seed(0))
    while True:
        with torch.no_grad():
            model(tokens_BS, labels=tokens_BS)
        ready.set()


@contextlib.contextmanager
def evaluator(behind: Callable[[], None]) -> Iterator[psutil.Process]:
    """One that is stopped."""
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    process = spawn.Process(target=score_for_ever, args=(behind, ready), daemon=True)
    process.start()
    try:
        assert ready.wait(600)
        found = psutil.Process(process.pid)
        found.suspend()
        yield found
    finally:
        process.kill()
        process.join()


def shared_core(rounds: int, pids: dict[str, int]) -> dict[str, list[tuple[float, float]]]:
    """(CPU seconds of a step, share of the core) by whom the core is shared with."""
    demo = demo_step(ep=1)
    others = {"alone": None} | {kind: psutil.Process(pid) for kind, pid in pids.items()}
    os.nice(RAYS_WORKERS)
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in others}
    demo.step(demo.batch, 1e-4, 0.0, False)
    for _ in range(rounds):
        for kind, other in others.items():
            found[kind].append(timed(lambda: demo.step(demo.batch, 1e-4, 0.0, False), other))
    return found


def timed(work: Callable[[], Any], other: psutil.Process | None) -> tuple[float, float]:
    before = cpu_of(other)
    if other is not None:
        os.kill(other.pid, signal.SIGCONT)
    start = time.process_time()
    work()
    ours = time.process_time() - start
    if other is not None:
        os.kill(other.pid, signal.SIGSTOP)
    return ours, ours / (ours + cpu_of(other) - before)


def cpu_of(process: psutil.Process | None) -> float:
    if process is None:
        return 0.0
    times = process.cpu_times()
    return float(times.user + times.system)


def share(rounds: int) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # this process's and all that it starts
    with evaluator(nice_alone) as nice, evaluator(step_back) as idle:
        pids = {"niceness 19": nice.pid, "idle class": idle.pid}
        (found,) = run_distributed(shared_core, 1, rounds, pids, timeout=3000.0)
    medians = {kind: [statistics.median(column) for column in zip(*measured)] for kind, measured in found.items()}
    for kind, (cpu_s, part) in medians.items():
        print(f"{kind:<12} {cpu_s:.3f} CPU-s a step, {part:.3f} of the core: a step lasts {1 / part:.2f} times as long")
    (alone, _), (_, before), (cpu_s, part) = medians.values()
    line = {"benchmark": "follow", "ours": round(part, 3), "peer": round(before, 3), "ratio": round(part / before, 2)}
    print(json.dumps({**line, "cpu_ratio": round(cpu_s / alone, 3), "target": TARGET, "met": part >= TARGET}))


# -- a whole run -------------------------------------------------------------------------------------------------------


def whole_runs() -> None:
    with tempfile.TemporaryDirectory() as root:
        _run(root, "warm-up", "--only", "prepare")
        seconds = {
            name: _train(root, name, *more) for name, more in [("without", []), ("with", ["evaluation.follow=true"])]
        }
        judged = len(list(Path(root, "runs/with/evaluate").glob("step-*.json")))
    for name, each in seconds.items():
        print(f"{name:<8} {each:.3f} s a step")
    print(f"ratio    {seconds['with'] / seconds['without']:.3f} with {judged} checkpoints judged")


def _train(root: str, run_id: str, *settings: str) -> float:
    """Median seconds of a step, from one committed checkpoint to the next; the first are left out."""
    _run(root, run_id, *settings)
    times = sorted(path.stat().st_mtime for path in Path(root, f"runs/{run_id}/train").glob("step-*/manifest.json"))
    return statistics.median(later - earlier for earlier, later in pairwise(times[2:])) / EVERY


def _run(root: str, run_id: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "jobs.pipeline", "--config", "debug", *SETTINGS]
    command += [f"storage.root={root}", f"run_id={run_id}"]
    subprocess.run([*command, *arguments], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="a whole training, with a follower and without")
    parser.add_argument("--rounds", type=positive, default=5)
    given = parser.parse_args()
    if given.run:
        whole_runs()
    else:
        share(given.rounds)


if __name__ == "__main__":
    main()
