"""Checkpoints to their scores: the stage is `jobs/stages/evaluate.py`, what follows training `jobs/drivers/follow.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.cli import parser
from jobs.drivers.follow import add_options, run
from jobs.stages import evaluate


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser("evaluate", evaluate.SUMMARY)
    add_options(made)
    return run(made.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
