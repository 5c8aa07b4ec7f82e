"""`jobs.verify`: which of a dataset, checkpoints and models is meant."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.cli import locate, parser, refusing
from jobs.on_ray.verify import verify_on_ray
from jobs.on_ray.verify_run import verify_checkpoints, verify_models
from jobs.stages.records import open_dataset

SUMMARY = "Prove a dataset, or checkpoints or models: each byte. Exit code 0: sound; 1: damaged; 2: no such dataset."


@refusing
def command(arguments: Sequence[str] | None) -> int:
    """Returns the exit code."""
    made = parser("verify", SUMMARY)
    what = made.add_mutually_exclusive_group()
    what.add_argument("--dataset", help="identity; default: the dataset of this configuration")
    what.add_argument("--checkpoints", action="store_true", help="the run's checkpoints instead")
    what.add_argument("--models", action="store_true", help="the published versions of publishing.name instead")
    given = made.parse_args(arguments)
    config, storage = locate(given.config, given.overrides)
    if given.checkpoints:
        return verify_checkpoints(config, storage)
    if given.models:
        return verify_models(config, storage)
    return verify_on_ray(config, open_dataset(config, storage, given.dataset), storage)
