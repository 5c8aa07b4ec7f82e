"""Evaluate: a checkpoint on the held-out documents of each source, and on tasks of lm-eval."""

from __future__ import annotations

import time
from collections.abc import Callable

from jobs.on_ray.gauges import SCORES
from jobs.stages.records import Records
from pipeline.config.load import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.evaluation import tasks
from pipeline.evaluation.result import EvaluationProgress, committed
from pipeline.manifest import EvaluationManifest
from pipeline.storage import Storage
from pipeline.workflow.record import StageProgress

NAME = "evaluate"
SUMMARY = "Score a checkpoint on the held-out documents of each source, and on tasks of lm-eval."
GAUGES = SCORES


def find(config: RunConfig, storage: Storage, records: Records) -> EvaluationManifest | None:
    assert records.dataset is not None
    if records.checkpoint is None:  # the mean of several, which is made before it is evaluated
        return None
    return committed(config, records.dataset, records.checkpoint, storage)


def check(config: RunConfig, storage: Storage, records: Records, *, here: bool) -> None:
    if config.corpus.heldout_fraction == 0.0:
        raise ConfigError(
            "corpus.heldout_fraction 0 holds nothing out, and evaluate needs documents; set it to 0.01, say"
        )
    tasks.check(config, data=here)


def do(config: RunConfig, storage: Storage, records: Records, report: Callable[[EvaluationProgress], None]) -> None:
    from jobs.on_ray.evaluate import average_with_ray, evaluate_with_ray  # here: it brings Ray

    assert records.dataset is not None
    evaluate_with_ray(config, records.dataset, records.checkpoint or average_with_ray(config), storage, report)


def progress() -> Callable[[EvaluationProgress], StageProgress]:
    return _Progress()


class _Progress:
    """Rate and ETA from the tokens done since the first report of what is being done."""

    def __init__(self) -> None:
        self._doing: str | None = None
        self._start, self._before = 0.0, 0

    def __call__(self, at: EvaluationProgress) -> StageProgress:
        now = time.monotonic()
        if at.doing != self._doing or at.done_tokens < self._before:
            self._doing, self._start = at.doing, now
        self._before = at.done_tokens
        rate = at.done_tokens / (now - self._start) if now > self._start else 0.0
        eta = (at.total_tokens - at.done_tokens) / rate if rate else None
        note = at.doing or f"loss {at.loss:.4f}"
        return StageProgress(NAME, at.done_tokens, at.total_tokens, "tokens", rate, "tokens", eta, note)
