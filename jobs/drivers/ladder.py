"""`jobs.ladder`: from its command line to the fit."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence

from jobs import stages
from jobs.cli import open_run, parser, refusing
from pipeline.config.load import ConfigError
from pipeline.ladder.climb import Ladder, climb
from pipeline.ladder.rungs import Rung, configure
from pipeline.ladder.show import lines, plot


@refusing
def command(arguments: Sequence[str] | None) -> int:
    """Returns the exit code."""
    made = parser("ladder", "A scaling ladder: Muon and AdamW at several sizes and seeds, and what the fit says.")
    made.add_argument("--sizes", type=_numbers(int), required=True, help="hidden sizes, comma-separated")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument(
        "--rates", type=_numbers(float), default=(0.5, 1.0, 2.0), help="times the recipe's, for the sweep"
    )
    made.add_argument("--batches", type=_numbers(float), default=(1.0,), help="times the recipe's")
    made.add_argument("--tokens-per-parameter", type=float, default=1.0)
    given = made.parse_args(arguments)
    if len(given.sizes) < 2:
        raise ConfigError(f"--sizes {','.join(map(str, given.sizes))}: a power law needs at least two sizes")
    if given.seeds < 1 or given.tokens_per_parameter <= 0:
        raise ConfigError("--seeds and --tokens-per-parameter must be greater than zero")
    config, storage = open_run(given.config, given.overrides)
    storage.check_writable()
    records = stages.find(config, storage, "train")
    stages.require_inputs("train", records)
    dataset = records.dataset
    assert dataset is not None
    for size in given.sizes:  # what cannot be is said before anything starts
        configure(config, Rung("muon", size, 1.0), given.tokens_per_parameter, dataset.digest)

    from jobs.on_ray.cluster import connect  # here: what is wrong needs no Ray
    from jobs.on_ray.ladder import measure_with_ray

    ladder = Ladder(tuple(sorted(set(given.sizes))), given.rates, given.batches, given.seeds)
    with connect(config):
        climbed = climb(ladder, measure_with_ray(config, dataset, given.tokens_per_parameter))
    for line in lines(climbed):
        print(line)
    folder = f"ladders/{config.run_id}"
    storage.write(f"{folder}/ladder.json", climbed.to_json())
    storage.write(f"{folder}/ladder.png", plot(climbed))
    print(f"figures and plot: {storage.uri(folder)}")
    print(json.dumps(climbed.record()["share"]))
    return 0


def _numbers(kind: type[int] | type[float]) -> Callable[[str], tuple[float, ...]]:
    def read(given: str) -> tuple[float, ...]:
        try:
            found = tuple(kind(part) for part in given.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{given!r} must be numbers, separated by commas") from None
        if min(found) <= 0:
            raise argparse.ArgumentTypeError(f"{given!r} must be greater than zero")
        return found

    return read
