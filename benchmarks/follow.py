"""Is a follower in training's way? The same training on a local Ray with `evaluation.follow` and without, one after the other.

    python -m benchmarks.follow

Prints the median seconds a step of both and their ratio. The follower judges every second step, far more than anybody would: it is at
work all the time. On a machine whose cores training fills it gets what is left at the lowest priority.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

STEPS, EVERY = 24, 2
SETTINGS = [
    f"schedule.total_tokens={STEPS * 8192}",
    f"checkpoint.every_steps={EVERY}",
    "checkpoint.keep=100",
    "evaluation.max_tokens_per_source=20000",
    "publishing.beats_frequencies=false",
    "publishing.sample_prompts=[]",
]


def main() -> None:
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
    command = [
        sys.executable,
        "-m",
        "jobs.pipeline",
        "--config",
        "debug",
        *SETTINGS,
        f"storage.root={root}",
        f"run_id={run_id}",
    ]
    subprocess.run([*command, *arguments], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
