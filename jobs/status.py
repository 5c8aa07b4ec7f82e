"""Where a run stands, wherever it runs: its stages, the progress of the one at work, its RayJobs on Kubernetes.

    python -m jobs.status --config <preset or path> [section.key=value ...]

Reads storage, starts nothing, changes nothing. A run on Kubernetes shows its RayJobs as the driver last saw them, from anywhere;
--kubernetes asks the cluster itself, which also knows when the driver is gone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    from jobs.views.status import command

    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
