"""Let somebody else do a run's stages: whoever prepares, trains or publishes it, alive or not, writes no more and leaves.

    python -m jobs.release --config <preset or path> [--stage train] [section.key=value ...]

Nobody need be asked to stop first. Of training the steps since the last checkpoint are lost, of the others nothing that is committed. A dataset
may be another run's as well, if it has the same corpus. Exit code 0, also if nobody was at work.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    from jobs.views.release import command

    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
