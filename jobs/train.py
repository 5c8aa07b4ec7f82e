"""The prepared dataset to checkpoints: the stage is `jobs/stages/train.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.first_line import say


def main(arguments: Sequence[str] | None = None) -> int:
    say(arguments)
    from jobs.stage import main as stage

    return stage("train", arguments)


if __name__ == "__main__":
    sys.exit(main())
