"""Prove a dataset: every checksum, count and invariant (pipeline/dataset/verify.py), in parallel on Ray.

    python -m jobs.verify --config <preset or path> [--dataset <identity>] [section.key=value ...]

One line per damaged file and row group, progress while it runs, one line of result. Exit code 0: everything is as the
manifest says; 1: something is not; 2: wrong configuration, or no such dataset.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.cli import locate, parser
from jobs.on_ray.verify import verify_on_ray
from jobs.stages.records import open_dataset

SUMMARY = "Prove a dataset: every checksum, count and invariant. Exit code 0: sound; 1: damaged; 2: no such dataset."


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser("verify", SUMMARY)
    made.add_argument("--dataset", help="identity; default: the dataset of this configuration")
    given = made.parse_args(arguments)
    try:
        config, storage = locate(given.config, given.overrides)
        return verify_on_ray(config, open_dataset(config, storage, given.dataset), storage)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
