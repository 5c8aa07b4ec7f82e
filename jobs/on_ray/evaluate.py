"""Evaluation on Ray: one task that scores the whole network, several that share the held-out text, or with GPUs the group of
workers that trained it.

A result that is already committed is found before Ray is asked for anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jobs.on_ray.task import Place, run_in_task, run_in_tasks, wants_gpu
from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.evaluation.result import EvaluationProgress, committed
from pipeline.manifest import CheckpointManifest, DatasetManifest, EvaluationManifest
from pipeline.storage import Storage, open_storage

Report = Callable[[EvaluationProgress], None]


def evaluate_with_ray(
    config: RunConfig,
    dataset: DatasetManifest,
    checkpoint: CheckpointManifest,
    storage: Storage,
    report: Report,
    *,
    with_tasks: bool = True,
    place: Place | None = None,
) -> EvaluationManifest:
    """Score the checkpoint on the connected Ray cluster. `report` is called where the work is done.

    Raises ValueError for wrong input, and Ray's own error after `cluster.max_failures` restarts.
    """
    found = committed(config, dataset, checkpoint, storage, with_tasks=with_tasks)
    if found is not None:
        return found
    work = _Work(config.model_dump(mode="json"), dataset.model_dump_json(), checkpoint.model_dump_json(), with_tasks)
    if config.cluster.use_gpu and config.parallelism.world_size > 1:
        from jobs.on_ray.group import run_in_group  # here: it brings torch

        folder = f"runs/{config.run_id}/evaluate/ray"
        arguments = (work, report)
        run_in_group(config, storage, _worker, name=f"evaluate-{checkpoint.step}", folder=folder, arguments=arguments)
    elif config.cluster.use_gpu or config.evaluation.scoring_tasks == 1:
        run_in_task(config, "evaluate", _evaluate, work, report, gpus=wants_gpu(config.cluster), place=place)
    else:
        _in_parts(config, work, report, place)
    found = committed(config, dataset, checkpoint, storage, with_tasks=with_tasks)
    assert found is not None
    return found


def average_with_ray(config: RunConfig) -> CheckpointManifest:
    """The mean that `publishing.average_last` asks for, made on the connected Ray cluster. Raises as `make_average` does."""
    return CheckpointManifest.model_validate_json(
        run_in_task(config, "average", _average, config.model_dump(mode="json"))
    )


@dataclass(frozen=True)
class _Work:
    """What a task is sent."""

    config: dict[str, Any]
    dataset: str
    checkpoint: str
    with_tasks: bool

    def open(self) -> tuple[RunConfig, DatasetManifest, CheckpointManifest, Storage]:
        config = validate(self.config)
        dataset = DatasetManifest.model_validate_json(self.dataset)
        return config, dataset, CheckpointManifest.model_validate_json(self.checkpoint), open_storage(config.storage)


def _in_parts(config: RunConfig, work: _Work, report: Report, place: Place | None) -> None:
    """Every task is of one size, that of the only task: with other numbers of threads sums would differ in their last digits."""
    count = config.evaluation.scoring_tasks
    calls: list[tuple[Any, ...]] = [(_part, work, (index, count), report) for index in range(count)]
    if work.with_tasks and config.evaluation.tasks:
        calls.append((_harness, work, report))
    *parts, last = run_in_tasks(config, "evaluate", calls, place=place)
    parts, tasks = (parts, last) if len(calls) > count else ([*parts, last], None)
    run_in_task(config, "evaluate", _join, work, parts, tasks, place=place)


def _worker(loop_config: dict[str, Any]) -> None:
    import ray.train

    work, report = loop_config["arguments"]
    config = validate(work.config).at_size(ray.train.get_context().get_world_size())
    _evaluate(replace(work, config=config.model_dump(mode="json")), report)


def _evaluate(work: _Work, report: Report) -> None:
    from pipeline.evaluation.heldout import evaluate

    config, dataset, checkpoint, storage = work.open()
    evaluate(config, dataset, checkpoint, storage, report=report, with_tasks=work.with_tasks)


def _part(work: _Work, part: tuple[int, int], report: Report) -> Any:
    from pipeline.evaluation.heldout import score_part

    config, dataset, checkpoint, storage = work.open()
    return score_part(config, dataset, checkpoint, storage, part=part, report=report)


def _harness(work: _Work, report: Report) -> Any:
    from pipeline.evaluation.harness import score_tasks
    from pipeline.evaluation.unseen import seen_questions
    from pipeline.evaluation.weights import load_model
    from pipeline.tokenizer import Encoder

    config, dataset, checkpoint, storage = work.open()
    model, encoder = load_model(config, checkpoint, storage), Encoder.stored(dataset.tokenizer, storage)
    return score_tasks(config, model, encoder, report, seen_questions(dataset, storage))


def _join(work: _Work, parts: list[Any], tasks: Any) -> None:
    from pipeline.evaluation.heldout import join_parts

    config, dataset, checkpoint, storage = work.open()
    join_parts(config, dataset, checkpoint, storage, parts, tasks, with_tasks=work.with_tasks)


def _average(config_values: dict[str, Any]) -> str:
    from pipeline.training.average import make_average

    config = validate(config_values)
    return make_average(config, open_storage(config.storage)).model_dump_json()
