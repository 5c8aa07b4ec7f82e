"""Prove a dataset: every checksum, count and invariant (pipeline/dataset/verify.py), in parallel on Ray. With `--checkpoints` every
committed checkpoint of the run instead, with `--models` every published version of `publishing.name`: each byte is read.

    python -m jobs.verify --config <preset or path> [--dataset <identity> | --checkpoints | --models] [section.key=value ...]

One line per damaged file and row group, progress while it runs, one line of result. Exit code 0: everything is as the
manifest says; 1: something is not; 2: wrong configuration, or no such dataset.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.cli import locate, parser
from jobs.on_ray.verify import verify_on_ray
from jobs.on_ray.verify_run import verify_checkpoints, verify_models
from jobs.stages.records import open_dataset

SUMMARY = "Prove a dataset, or checkpoints or models: each byte. Exit code 0: sound; 1: damaged; 2: no such dataset."


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser("verify", SUMMARY)
    what = made.add_mutually_exclusive_group()
    what.add_argument("--dataset", help="identity; default: the dataset of this configuration")
    what.add_argument("--checkpoints", action="store_true", help="the run's checkpoints instead")
    what.add_argument("--models", action="store_true", help="the published versions of publishing.name instead")
    given = made.parse_args(arguments)
    try:
        config, storage = locate(given.config, given.overrides)
        if given.checkpoints:
            return verify_checkpoints(config, storage)
        if given.models:
            return verify_models(config, storage)
        return verify_on_ray(config, open_dataset(config, storage, given.dataset), storage)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
