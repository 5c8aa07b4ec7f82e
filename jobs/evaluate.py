"""Checkpoints to their scores: the stage is `jobs/stages/evaluate.py`, what follows training `jobs/drivers/follow.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.first_line import say


def main(arguments: Sequence[str] | None = None) -> int:
    say(arguments)
    from jobs.drivers.follow import command

    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
