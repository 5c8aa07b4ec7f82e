"""Run a function over units: in this process, or as Ray Data tasks.

Rows are descriptions of units (a few kilobytes) in and manifests out, pickled; what all of them have in common goes with the
function, once; token bytes never enter the object store. Ray retries a task whose worker or node died for as long as it takes;
a unit that is itself the cause is dealt with in `attempts.py`.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipeline.config.load import ConfigError
from pipeline.config.schema import ClusterConfig

MapUnits = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[tuple[int, Any]]]
"""(function, items) -> (index of the item, result) in any order. An exception of the function ends the map."""


def map_in_process(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    for index, item in enumerate(items):
        yield index, function(item)


def map_on_ray(cluster: ClusterConfig) -> MapUnits:
    """Ray Data over the items, one task each, on an initialised Ray. Autoscaling and lost nodes are Ray's business."""

    def run(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        import ray.data

        if not items:
            return
        _quiet()
        context = ray.data.DataContext.get_current()
        context.execution_no_progress_timeout_s = -1  # a unit takes minutes, and waiting for nodes may take hours
        context.enable_progress_bars = False
        rows = [{"index": index, "item": pickle.dumps(item)} for index, item in enumerate(items)]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))

        def call(row: dict[str, Any]) -> dict[str, Any]:
            try:
                return {
                    "index": row["index"],
                    "result": pickle.dumps(function(pickle.loads(row["item"]))),
                    "refused": "",
                }
            except ConfigError as error:  # a line for the user, which Ray would bury in tracebacks
                return {"index": row["index"], "result": b"", "refused": str(error)}

        done = dataset.map(call, num_cpus=cluster.prepare_cpus, memory=cluster.prepare_memory_bytes)
        done.set_name(getattr(function, "func", function).__name__.strip("_"))  # what the dashboard calls it
        for row in done.iter_rows():
            if row["refused"]:
                raise ConfigError(row["refused"])
            yield int(row["index"]), pickle.loads(row["result"])

    return run


def _quiet() -> None:
    """Prepare tells its progress itself. Ray Data's plans and phases stay in its own file, logs/ray-data of the session; warnings are
    shown, but for the one that progress bars are off, as they were told to be."""
    for handler in logging.getLogger("ray.data").handlers:
        if handler.get_name() == "console":
            handler.setLevel(logging.WARNING)
            handler.addFilter(_no_word_of_progress_bars)


def _no_word_of_progress_bars(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Progress bars disabled")
