"""What an evaluation found, for people: the held-out text of each source beside simple compressors, and tasks of lm-eval."""

from __future__ import annotations

from html import escape

from pipeline.evaluation.baselines import SHOWN
from pipeline.manifest import DatasetManifest, EvaluationManifest, SourceManifest, SourceScore, TaskScore
from pipeline.report.parts import table

TASK_HEAD = ["version", "few-shot", "documents", "metric", "value ± standard error"]
UNSEEN_HEAD = ["not in the corpus", "value of these"]


def scored_sources(dataset: DatasetManifest, evaluation: EvaluationManifest) -> list[SourceManifest]:
    """The sources with a score, in the dataset's order."""
    return [source for source in dataset.sources if source.name in evaluation.sources]


def task_head(evaluation: EvaluationManifest) -> list[str]:
    """Of a row's cells: with the questions that were not in the corpus, where they were looked for."""
    return TASK_HEAD + (UNSEEN_HEAD if _looked(evaluation) else [])


def task_cells(evaluation: EvaluationManifest, score: TaskScore) -> list[list[str]]:
    """A row a metric, under `task_head`."""
    shots = "" if score.few_shot is None else str(score.few_shot)
    rows = [[score.version, shots, f"{score.documents:,}", metric.label, metric.shown] for metric in score.metrics]
    if not _looked(evaluation):
        return rows
    left = "not looked for" if score.unseen_documents is None else f"{score.unseen_documents:,}"
    values = {metric.label: metric.shown for metric in score.unseen}
    return [[*row, left, values.get(metric.label, "")] for row, metric in zip(rows, score.metrics, strict=True)]


def _looked(evaluation: EvaluationManifest) -> bool:
    return any(score.unseen_documents is not None for score in evaluation.tasks.values())


def scored_how(evaluation: EvaluationManifest) -> str:
    """What the tasks' values mean, in a sentence."""
    return (
        f"Scored with {evaluation.harness} on prompts that begin with an end-of-text token, contexts cut from the left to "
        f"{evaluation.sequence_length:,} tokens; text is generated greedily."
    )


def heldout_text(dataset: DatasetManifest, evaluation: EvaluationManifest) -> str:
    """A row a source, with bits per byte of the model and of its baselines as bars."""
    names = [name for name in SHOWN if name in evaluation.baselines]
    sources = {source.name: evaluation.sources[source.name] for source in scored_sources(dataset, evaluation)}
    scores = {**sources, "all": evaluation.overall}
    baselines = {**evaluation.source_baselines, "all": evaluation.baselines}
    largest = max(value for row in baselines.values() for value in row.values())
    largest = max(largest, *(score.bits_per_byte for score in scores.values()))

    def row(name: str, score: SourceScore) -> list[str]:
        best = min(baselines[name].values()) > score.bits_per_byte
        own = _bar(score.bits_per_byte, largest, "var(--series-0)", strong=best)
        others = [_bar(baselines[name][other], largest, "var(--muted)") for other in names]
        return [escape(name), f"{score.documents:,}", f"{score.tokens:,}", f"{score.loss:.3f}", own, *others]

    head = ["source", "documents", "tokens", "loss", "model", *(escape(name) for name in names)]
    rows = [row(name, score) for name, score in scores.items()]
    note = (
        "Loss in nats per token; from <em>model</em> on, bits per byte of the same text. Compressors start from nothing; "
        "token frequencies are those of the text itself. Bold: better than every baseline."
    )
    return f"{table(head, rows)}<p class='note'>{note}</p>"


def tasks(evaluation: EvaluationManifest) -> str:
    """A row a metric of each task. Empty without tasks."""
    if not evaluation.tasks:
        return ""
    rows = [
        [escape(cell) for cell in (name, score.group or "", *cells)]
        for name, score in evaluation.tasks.items()
        for cells in task_cells(evaluation, score)
    ]
    return f"{table(['task', 'in group', *task_head(evaluation)], rows, left=2)}<p class='note'>{escape(scored_how(evaluation))}</p>"


def _bar(value: float, largest: float, colour: str, strong: bool = False) -> str:
    text = f"<b>{value:.3f}</b>" if strong else f"{value:.3f}"
    share = f"{100 * value / (largest or 1.0):.1f}%"
    return f'{text}<div class="bar"><i style="width:{share};background:{colour}"></i></div>'
