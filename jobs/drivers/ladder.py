"""`jobs.ladder`: from its command line to the fit."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from jobs import stages
from jobs.cli import open_run, parser, refusing
from jobs.drivers.failures import HELD
from pipeline.config.load import ConfigError
from pipeline.ladder.climb import Ladder, climb
from pipeline.ladder.rungs import Rung, configure
from pipeline.ladder.show import lines, plot
from pipeline.lease import Held


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
    made.add_argument(
        "--tuned", type=int, default=2, help="how many of the smallest sizes have their rates swept (default: 2)"
    )
    given = made.parse_args(arguments)
    if len(set(given.sizes)) < 2:
        raise ConfigError(f"--sizes {','.join(map(str, given.sizes))}: a power law needs at least two sizes")
    if given.seeds < 1 or given.tokens_per_parameter <= 0 or given.tuned < 1:
        raise ConfigError("--seeds, --tokens-per-parameter and --tuned must be greater than zero")
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
    from jobs.on_ray.signals import Interrupted, raise_on_signals

    sizes, rates = tuple(sorted(set(given.sizes))), tuple(sorted(set(given.rates)))
    ladder = Ladder(sizes, rates, given.batches, given.seeds, given.tuned)
    try:
        with connect(config):
            raise_on_signals()
            climbed = climb(ladder, measure_with_ray(config, dataset, given.tokens_per_parameter))
    except Interrupted as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except Held as error:
        print(f"error: {error}", file=sys.stderr)
        return HELD
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
