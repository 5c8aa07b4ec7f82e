"""Prove a dataset: every checksum, count and invariant (pipeline/dataset/verify.py), in parallel on Ray. With `--checkpoints` every
committed checkpoint of the run instead, with `--models` every published version of `publishing.name`: each byte is read.

    python -m jobs.verify --config <preset or path> [--dataset <identity> | --checkpoints | --models] [section.key=value ...]

One line per damaged file and row group, progress while it runs, one line of result. Exit code 0: everything is as the
manifest says; 1: something is not; 2: wrong configuration, or no such dataset.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.first_line import say


def main(arguments: Sequence[str] | None = None) -> int:
    say(arguments, "reading what is to be verified")
    from jobs.views.verify import command

    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
