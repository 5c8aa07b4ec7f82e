"""Let somebody else do a run's stages: whoever prepares, trains or publishes it, alive or not, writes no more and leaves.

    python -m jobs.release --config <preset or path> [--stage train] [section.key=value ...]

Nobody need be asked to stop first. Of training the steps since the last checkpoint are lost, of the others nothing that is committed. A dataset
may be another run's as well, if it has the same corpus. Exit code 0, also if nobody was at work.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.cli import open_run, parser
from jobs.stages.leases import LEASED, release


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser("release", "Tell whoever prepares, trains or publishes a run to write no more.")
    made.add_argument("--stage", choices=LEASED, help="this one alone")
    given = made.parse_args(arguments)
    nobody = True
    try:
        config, storage = open_run(given.config, given.overrides)
        for stage in (
            [given.stage] if given.stage else LEASED[::-1]
        ):  # the corpus, which may be out of reach, comes last
            holder = release(stage, config, storage)
            if holder is not None:
                nobody = False
                print(f"run {config.run_id}: {stage} taken from {holder.who}", flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if nobody:
        print(f"run {config.run_id}: nobody is at work on it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
