"""Send a run's records to its trackers: those of a run that is over, or whose trackers were named later or were away.

    python -m jobs.track --config <preset or path> [tracking.trackers='["wandb"]'] [section.key=value ...]

What a tracker has already is asked of it and not sent again. Exit code 0; 1 if a tracker does not answer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    from jobs.views.track import command

    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
