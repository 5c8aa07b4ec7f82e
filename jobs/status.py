"""Where a run stands, wherever it runs: its stages, the progress of the one at work, its RayJobs on Kubernetes.

    python -m jobs.status --config <preset or path> [section.key=value ...]

Reads storage, starts nothing, changes nothing. A run on Kubernetes shows its RayJobs as the driver last saw them, from anywhere;
--kubernetes asks the cluster itself, which also knows when the driver is gone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs import stages
from jobs.cli import open_run, parser
from jobs.views.status import require_run, show


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser("status", "Show where a run stands.")
    made.add_argument("--kubernetes", action="store_true", help="also list the run's RayJobs in the current cluster")
    given = made.parse_args(arguments)
    try:
        config, storage = open_run(given.config, given.overrides)
        require_run(config, storage)
        records = stages.find(config, storage)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return show(config, storage, records, kubernetes=given.kubernetes)


if __name__ == "__main__":
    sys.exit(main())
