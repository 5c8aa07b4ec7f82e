"""The scores of all of a run's checkpoints over tokens: as a section of the run's page, and as a page of its own while training
goes on.

    <root>/runs/<run_id>/evaluation.html    curves, and a table with a row a checkpoint; written anew after each
    <root>/runs/<run_id>/evaluation.png     the held-out loss over tokens, of each source

No torch in here: the pages follow from the records alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape

from pipeline.evaluation.paper import Figure, beside, figure_of
from pipeline.integrity import read_record
from pipeline.manifest import EvaluationManifest, SourceScore, TaskMetric
from pipeline.report.charts import Mark, Series, compact
from pipeline.report.parts import figure, page, section, table
from pipeline.storage import Storage

RECORD = re.compile(r"step-\d{8,}\.json")
COLOURS = (
    "var(--series-0)",
    "#0d9488",
    "#a855f7",
    "#ca8a04",
    "#db2777",
    "#64748b",
)  # of sources; of more only the first have a curve
OURS, THEIRS = "var(--series-0)", "var(--series-1)"


def page_path(run_id: str) -> str:
    return f"runs/{run_id}/evaluation.html"


def picture_path(run_id: str) -> str:
    return f"runs/{run_id}/evaluation.png"


def read_all(storage: Storage, run_id: str) -> list[EvaluationManifest]:
    """The results of the run's own checkpoints, oldest first. Raises DamagedRecord.

    Without those of older versions, which do not say how many tokens their checkpoint had seen.
    """
    folder = f"runs/{run_id}/evaluate"
    names = sorted(name for name in storage.names(folder) if RECORD.fullmatch(name))
    found = (read_record(storage, f"{folder}/{name}", EvaluationManifest) for name in names)
    known = [each for each in found if each is not None and each.tokens_seen is not None]
    return sorted(known, key=lambda each: each.step)


def render(run_id: str, evaluations: Sequence[EvaluationManifest]) -> str:
    """The page as text. There must be a result."""
    newest = evaluations[-1]
    head = (
        f"<header><h1>{escape(run_id)}</h1><p>{len(evaluations)} checkpoints judged, the newest of step {newest.step:,}, "
        f"{compact(newest.tokens_seen or 0)} tokens</p></header>"
    )
    return page(f"{run_id}: evaluation", head + section("Checkpoints", checkpoints(evaluations)))


def checkpoints(evaluations: Sequence[EvaluationManifest]) -> str:
    """Curves over tokens and a row a checkpoint; the paper's figures beside ours where the task is the same."""
    charts = "".join([_loss_chart(evaluations), _bits_chart(evaluations), *_task_charts(evaluations)])
    paper = _paper(evaluations)
    return f'<div class="charts">{charts}</div>{_rows(evaluations)}{paper}'


def _loss_chart(evaluations: Sequence[EvaluationManifest]) -> str:
    unigram = [Mark("unigram entropy", evaluations[-1].unigram_entropy)]
    return figure("Held-out loss", "nats per token", _by_source(evaluations, "loss"), unigram)


def _bits_chart(evaluations: Sequence[EvaluationManifest]) -> str:
    return figure("Bits per byte", "of held-out text", _by_source(evaluations, "bits_per_byte"), [])


def _by_source(evaluations: Sequence[EvaluationManifest], number: str) -> list[Series]:
    def points(scores: Iterator[tuple[int | None, SourceScore | None]]) -> list[tuple[float, float]]:
        return [(tokens or 0, getattr(score, number)) for tokens, score in scores if score is not None]

    names = list(dict.fromkeys(name for each in evaluations for name in each.sources))[: len(COLOURS)]
    lines = [Series("all", points((each.tokens_seen, each.overall) for each in evaluations), THEIRS, 2.6)]
    for name, colour in zip(names if len(names) > 1 else (), COLOURS):
        found = ((each.tokens_seen, each.sources.get(name)) for each in evaluations)
        lines.append(Series(name, points(found), colour, 1.6))
    return lines


def _task_charts(evaluations: Sequence[EvaluationManifest]) -> Iterator[str]:
    """One a task or group that no other averages and was asked at two checkpoints at least: its first metric with a number."""
    for name in dict.fromkeys(name for each in evaluations for name, task in each.tasks.items() if task.group is None):
        asked = [(each, metric) for each in evaluations if (metric := _first(each, name)) is not None]
        if len(asked) < 2:
            continue
        newest, metric = asked[-1]
        points = [(each.tokens_seen or 0, one.value or 0.0) for each, one in asked if one.label == metric.label]
        theirs = figure_of(newest, name, metric)
        marks = [] if theirs is None else [Mark("Moonlight, 5.7T tokens", theirs.final / 100)]
        yield figure(name, metric.label, [Series(name, points, OURS)], marks)


def _first(evaluation: EvaluationManifest, name: str) -> TaskMetric | None:
    """The metric that the paper has a figure of, else the first with a number."""
    task = evaluation.tasks.get(name)
    known = [] if task is None else [metric for metric in task.metrics if metric.value is not None]
    return next((metric for metric in known if figure_of(evaluation, name, metric)), known[0] if known else None)


def _rows(evaluations: Sequence[EvaluationManifest]) -> str:
    sources = list(dict.fromkeys(name for each in evaluations for name in each.sources))
    tasks = list(dict.fromkeys(name for each in evaluations for name, task in each.tasks.items() if task.group is None))
    labels = {
        name: metric.label for each in evaluations for name in tasks if (metric := _first(each, name)) is not None
    }
    head = ["step", "tokens", "loss", "bits per byte", *sources, *(f"{name} {labels.get(name, '')}" for name in tasks)]
    best = min(each.overall.loss for each in evaluations)

    def cells(each: EvaluationManifest) -> list[str]:
        loss = _with_error(each.overall.loss, each.overall.stderr)
        losses = [f"{each.sources[name].loss:.4f}" if name in each.sources else "" for name in sources]
        metrics = (_first(each, name) for name in tasks)
        scores = ["" if metric is None else escape(metric.shown) for metric in metrics]
        shown = f"<b>{loss}</b>" if each.overall.loss == best else loss
        bits = f"{each.overall.bits_per_byte:.4f}"
        return [f"{each.step:,}", compact(each.tokens_seen or 0), shown, bits, *losses, *scores]

    note = "Losses in nats per token, with the standard error over documents; bold: the lowest."
    body = table([escape(name) for name in head], [cells(each) for each in evaluations])
    return f"{body}<p class='note'>{note}</p>"


def _with_error(value: float, stderr: float | None) -> str:
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


def _paper(evaluations: Sequence[EvaluationManifest]) -> str:
    found = next((pairs for each in reversed(evaluations) if (pairs := beside(each))), [])
    if not found:
        return ""

    def cells(theirs: Figure, ours: TaskMetric) -> list[str]:
        error = "" if ours.stderr is None else f" ± {100 * ours.stderr:.1f}"
        early = "" if theirs.early is None else f"{theirs.early:.1f}"
        return [
            theirs.name,
            str(theirs.few_shot),
            f"{100 * (ours.value or 0.0):.1f}{error}",
            early,
            f"{theirs.final:.1f}",
        ]

    head = ["benchmark", "few-shot", "here, per cent", "Moonlight at 1.2T", "Moonlight at 5.7T"]
    note = (
        "Moonlight's figures: arXiv 2502.16982, tables 4 and 5; only tasks, metrics and numbers of examples that are the same. The "
        "harness is another one."
    )
    return f"<h2>Beside the paper</h2>{table(head, [cells(*pair) for pair in found])}<p class='note'>{note}</p>"
