"""`jobs.profile`: a profile of a run that is at work."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from jobs.cli import open_run, parser, refusing
from jobs.views.status import require_run
from pipeline.config.training import MOST_PROFILED
from pipeline.training.profiles import ask, profile_folder


@refusing
def command(arguments: Sequence[str] | None) -> int:
    """Returns the exit code."""
    made = parser("profile", "Ask a run that is training for a profile of some steps.")
    made.add_argument("--steps", type=_count, default=3, help="how many (default 3)")
    made.add_argument("--ranks", type=_ranks, default=(0,), help="comma-separated (default 0)")
    made.add_argument("--at", type=int, help="the first step; by default as soon as all ranks have heard of it")
    given = made.parse_args(arguments)
    config, storage = open_run(given.config, given.overrides)
    require_run(config, storage)
    request = ask(storage, config, given.steps, given.ranks, given.at)
    first, last = request.steps
    print(f"run {config.run_id} is asked to profile steps {first} to {last} on ranks {list(request.ranks)}", flush=True)
    print(f"then they are in {storage.uri(profile_folder(config.run_id, first))}", flush=True)
    return 0


def _count(given: str) -> int:
    if not given.isdecimal() or not 1 <= int(given) <= MOST_PROFILED:
        raise argparse.ArgumentTypeError(f"{given!r} must be a number from 1 to {MOST_PROFILED}")
    return int(given)


def _ranks(given: str) -> tuple[int, ...]:
    if not all(part.strip().isdecimal() for part in given.split(",")):
        raise argparse.ArgumentTypeError(f"{given!r} must be ranks, separated by commas: 0,8")
    return tuple(int(part) for part in given.split(","))
