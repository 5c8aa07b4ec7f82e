"""Scores of the questions that were not in the corpus, by the harness's own averages over what is left of its samples."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq

from pipeline.integrity import read_checked
from pipeline.manifest import DatasetManifest
from pipeline.storage import Storage

Seen = Mapping[str, frozenset[str]]
"""Keys of the questions that were found in the corpus, by task; tasks that were looked for and not found have none."""


def seen_questions(dataset: DatasetManifest, storage: Storage) -> Seen | None:
    """None for a dataset in which nobody looked. Raises DamagedFile."""
    found = dataset.contamination
    if found is None:
        return None
    rows = pq.read_table(io.BytesIO(read_checked(storage, found.seen))).to_pylist()
    keys: dict[str, set[str]] = {name: set() for name in found.tasks}
    for row in rows:
        keys[row["task"]].add(row["key"])
    return {name: frozenset(each) for name, each in keys.items()}


def unseen_values(
    samples: Mapping[str, Sequence[dict[str, Any]]], tasks: Sequence[Any], seen: Seen, *, resamples: int
) -> dict[str, dict[str, Any]]:
    """Of tasks that were looked for, and of groups of nothing else, what `simple_evaluate` says of all: "acc,none", "acc_stderr,none",
    "sample_len". A task of which nothing is left has a sample_len of 0 and no values. `tasks`: lm-eval's Task and Group objects."""
    from lm_eval.api.group import Group

    values: dict[str, dict[str, Any]] = {}
    for task in _tasks(tasks):
        if task.task_name in seen and task.task_name in samples:
            values[task.task_name] = _of_task(task, samples[task.task_name], seen[task.task_name], resamples)
    left = {name: value for name, value in values.items() if value["sample_len"]}
    for group in (each for each in tasks if isinstance(each, Group)):
        for one in [*group.get_all_groups(), group]:
            if one.has_aggregation and all(task.task_name in values for task in one.get_all_tasks()):
                some = any(task.task_name in left for task in one.get_all_tasks())
                values[one.name] = dict(one.aggregate(left)) if some else {"sample_len": 0}
    return values


def _tasks(found: Sequence[Any]) -> Iterator[Any]:
    from lm_eval.api.group import Group

    for each in found:
        yield from each.get_all_tasks() if isinstance(each, Group) else [each]


def _of_task(task: Any, samples: Sequence[dict[str, Any]], seen: frozenset[str], resamples: int) -> dict[str, Any]:
    from lm_eval.api.metrics import mean, stderr_for_metric

    kept = [sample for sample in samples if sample["doc_hash"] not in seen]
    items: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for sample in kept:
        for metric in sample["metrics"]:
            items[metric, sample["filter"]].append(sample[metric])
    values: dict[str, Any] = {"sample_len": len({sample["doc_id"] for sample in kept})}
    for (metric, cut), found in items.items():
        average: Callable[[list[Any]], float] = task.aggregation().get(metric, mean)
        error = stderr_for_metric(average, resamples)
        values[f"{metric},{cut}"] = average(found)
        values[f"{metric}_stderr,{cut}"] = error(found) if error is not None and len(found) > 1 else "N/A"
    return values
