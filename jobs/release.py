"""Let somebody else train a run: whoever trains it, alive or not, writes no more and leaves.

    python -m jobs.release --config <preset or path> [section.key=value ...]

Nobody need be asked to stop first, and nothing is lost but the steps since the last checkpoint. Exit code 0, also if nobody trained it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.cli import open_run, parser
from pipeline.lease import give_way
from pipeline.training.commits import lease_path


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser("release", "Tell whoever trains a run to write no more.").parse_args(arguments)
    try:
        config, storage = open_run(given.config, given.overrides)
        holder = give_way(storage, lease_path(config.run_id))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"run {config.run_id}: " + (f"taken from {holder.who}" if holder else "nobody trains it"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
