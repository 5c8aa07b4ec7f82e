"""The driver that fault tests kill: config as JSON on the command line, then `prepare` on a Ray of its own.

A second argument names a file to which every worker appends a line when it begins to tokenize or to pack a unit; a unit
that it finds committed it does not begin.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray

from data_prep.mapping import map_on_ray
from data_prep.prepare import prepare
from data_prep.rules.actors import classifier_actors
from pipeline.config.schema import RunConfig
from pipeline.storage import open_storage


def main() -> None:
    config = RunConfig.model_validate_json(sys.argv[1])
    start_ray()
    on_ray = map_on_ray(config.cluster)

    def logging_starts(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        return on_ray(partial(logged, Path(sys.argv[2]), function), items)

    with classifier_actors(config) as classify:
        dataset = prepare(
            config,
            open_storage(config.storage),
            map_units=logging_starts if len(sys.argv) > 2 else on_ray,
            classify=classify,
            report=lambda progress: print(progress.line(), flush=True),
        )
    print("digest", dataset.digest, flush=True)


def start_ray(attempts: int = 10) -> None:
    """Ray gives its node 30 s to start (ray/_private/node.py); a busy machine may need several of them."""
    for left in reversed(range(attempts)):
        try:
            ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
            return
        except Exception as error:
            if not left:
                raise
            print(f"Ray did not start: {error}", flush=True)
            ray.shutdown()


def logged(log: Path, function: Callable[[Any], Any], item: Any) -> Any:
    """`function(item)` in a worker whose unit functions write down that they begin."""
    from data_prep import attempts, pack_unit

    def announce(module: Any, name: str, unit_argument: int, said: str) -> None:
        original = getattr(module, name)
        if hasattr(original, "announced"):
            return

        def announcing(*arguments: Any) -> Any:
            with log.open("a") as file:
                file.write(f"{said} {arguments[unit_argument].id} {os.getpid()}\n")
            return original(*arguments)

        announcing.announced = True  # type: ignore[attr-defined]
        setattr(module, name, announcing)

    announce(attempts, "tokenize_unit", 1, "tokenize")
    announce(
        attempts, "_tokenize_alone", 2, "tokenize"
    )  # a unit that was killed twice, perhaps before it said that it begins
    announce(pack_unit, "_pack", 1, "pack")
    return function(item)


if __name__ == "__main__":
    main()
