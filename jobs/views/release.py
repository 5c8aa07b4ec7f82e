"""`jobs.release`: whoever prepares, trains or publishes a run writes no more."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.cli import open_run, parser, refusing
from jobs.stages.leases import LEASED, release


@refusing
def command(arguments: Sequence[str] | None) -> int:
    """Returns the exit code."""
    made = parser("release", "Tell whoever prepares, trains or publishes a run to write no more.")
    made.add_argument("--stage", choices=LEASED, help="this one alone")
    given = made.parse_args(arguments)
    config, storage = open_run(given.config, given.overrides)
    nobody = True
    for stage in [given.stage] if given.stage else LEASED[::-1]:  # the corpus, which may be out of reach, comes last
        holder = release(stage, config, storage)
        if holder is not None:
            nobody = False
            print(f"run {config.run_id}: {stage} taken from {holder.who}", flush=True)
    if nobody:
        print(f"run {config.run_id}: nobody is at work on it")
    return 0
