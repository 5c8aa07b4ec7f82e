"""The number that a gate is about, and two models' numbers side by side. No torch in here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.config.gates import GateConfig
from pipeline.evaluation.documents import Documents, Numbers, column, shared
from pipeline.evaluation.errors import Estimate, independent, paired, ratio
from pipeline.manifest import EvaluationManifest, SourceScore, TaskMetric, TaskScore

SHARED = 0.5  # of the documents of either evaluation must be in both, or the two count as independent


class Incomparable(Exception):
    """There is no such number, or it means something else on the other side; the message says why."""


@dataclass(frozen=True)
class Scored:
    """A model and what it scored. `documents`: None where single documents were not kept."""

    name: str  # for people
    evaluation: EvaluationManifest
    documents: Documents | None


@dataclass(frozen=True)
class Comparison:
    ours: float
    theirs: float
    difference: Estimate  # ours - theirs
    lower_is_better: bool
    how: str  # for people


def measure(gate: GateConfig, model: Scored) -> Estimate:
    """The gate's number of a model. Raises Incomparable if nobody computed it."""
    if gate.task is None:
        return _heldout(gate, _source(gate, model))
    metric = _metric(gate, _task(gate, model))
    if metric.value is None:
        raise Incomparable("it is no finite number")
    return Estimate(metric.value, metric.stderr)


def compare(gate: GateConfig, model: Scored, other: Scored) -> Comparison:
    """The gate's number of two models. Raises Incomparable."""
    return _compare_heldout(gate, model, other) if gate.task is None else _compare_task(gate, model, other)


def _compare_heldout(gate: GateConfig, model: Scored, other: Scored) -> Comparison:
    ours, theirs = measure(gate, model), measure(gate, other)
    mine, yours = model.evaluation, other.evaluation
    if gate.metric == "loss" and mine.tokenizer_sha256 != yours.tokenizer_sha256:
        raise Incomparable(
            f"{other.name} has another tokenizer, and losses per token compare under one only; use metric: bits_per_byte"
        )
    windows = (
        ""
        if mine.sequence_length == yours.sequence_length
        else f", in windows of {mine.sequence_length} and {yours.sequence_length} tokens"
    )
    if model.documents is not None and other.documents is not None:
        a, b = model.documents.of_source(gate.source), other.documents.of_source(gate.source)
        both = shared(a, b, ["source", "key"])
        if _enough(len(both[0]), len(a), len(b)):
            scale = 1.0 if gate.metric == "loss" else math.log(2)
            n = column(both[0], "tokens" if gate.metric == "loss" else "bytes")
            x, y = (column(table, "nats") / scale for table in both)
            return _paired(x, y, n, (len(a), len(b)), "documents", True, windows)
    return Comparison(ours.value, theirs.value, independent(ours, theirs), True, f"on different documents{windows}")


def _compare_task(gate: GateConfig, model: Scored, other: Scored) -> Comparison:
    mine, yours = _task(gate, model), _task(gate, other)
    if (mine.version, mine.few_shot) != (yours.version, yours.few_shot):
        raise Incomparable(
            f"{other.name} was asked version {yours.version} with {yours.few_shot} examples, this one version {mine.version} "
            f"with {mine.few_shot}"
        )
    metric, ours, theirs = _metric(gate, mine), measure(gate, model), measure(gate, other)
    if metric.higher_is_better is None:
        raise Incomparable(f"lm-eval does not say which way {metric.label} is better; use at_most or at_least")
    lower = not metric.higher_is_better
    assert gate.task is not None
    if model.documents is not None and other.documents is not None:
        a, b = (each.of_task(gate.task, metric.filter, metric.name) for each in (model.documents, other.documents))
        both = shared(a, b, ["key"])
        if _enough(len(both[0]), len(a), len(b)) and _is_mean(a, ours) and _is_mean(b, theirs):
            x, y = (column(table, "value") for table in both)
            return _paired(x, y, x * 0 + 1, (len(a), len(b)), "questions", lower, "")
    how = "as independent scores: a group of tasks, or questions were not kept"
    return Comparison(ours.value, theirs.value, independent(ours, theirs), lower, how)


def _paired(
    x: Numbers, y: Numbers, n: Numbers, counts: tuple[int, int], what: str, lower_is_better: bool, note: str
) -> Comparison:
    some = "" if counts == (len(x), len(x)) else f" that both were asked, of {counts[0]:,} and {counts[1]:,}"
    how = f"paired over {len(x):,} {what}{some}{note}"
    return Comparison(ratio(x, n).value, ratio(y, n).value, paired(x, y, n), lower_is_better, how)


def _enough(both: int, ours: int, theirs: int) -> bool:
    return both > 0 and both >= SHARED * max(ours, theirs)


def _is_mean(table: object, of_task: Estimate) -> bool:
    """Is the task's metric the mean over its documents? A perplexity, say, is not."""
    values = column(table, "value")  # type: ignore[arg-type]
    return len(values) > 0 and abs(float(values.mean()) - of_task.value) < 1e-5


def _source(gate: GateConfig, model: Scored) -> SourceScore:
    if gate.source is None:
        return model.evaluation.overall
    found = model.evaluation.sources.get(gate.source)
    if found is None:
        there = ", ".join(model.evaluation.sources)
        raise Incomparable(f"{model.name} has no held-out score of source {gate.source!r}; it has {there}")
    return found


def _heldout(gate: GateConfig, score: SourceScore) -> Estimate:
    if gate.metric == "loss":
        return Estimate(score.loss, score.stderr)
    return Estimate(score.bits_per_byte, score.bits_stderr)


def _task(gate: GateConfig, model: Scored) -> TaskScore:
    assert gate.task is not None
    found = model.evaluation.tasks.get(gate.task)
    if found is None:
        there = ", ".join(model.evaluation.tasks) or "none"
        raise Incomparable(f"nobody computed task {gate.task} for {model.name}; it has {there}")
    return found


def _metric(gate: GateConfig, score: TaskScore) -> TaskMetric:
    named = [metric for metric in score.metrics if metric.name == gate.metric]
    found = [metric for metric in named if gate.filter in (None, metric.filter)]
    if len(found) == 1:
        return found[0]
    there = ", ".join(metric.label for metric in score.metrics)
    if found:
        raise Incomparable(f"its answers were cut in {len(found)} ways: name the filter; there are {there}")
    raise Incomparable(f"the task has no such metric; it has {there}")
