"""report.html of a run: one file to read, mail or print, with nothing to load.

It shows what the manifests, the metrics and the configuration say; only the stage times, which the caller measured,
come from elsewhere. It is written beside the run, not hashed and not published. Links go to the run's artefacts by
relative path, so the storage root may be a folder or a bucket behind a web server.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pipeline.config.load import dump_yaml
from pipeline.config.schema import RunConfig
from pipeline.evaluation.baselines import SHOWN
from pipeline.evaluation.charts import Mark, Point, Series, compact
from pipeline.evaluation.curves import checkpoints, read_all
from pipeline.evaluation.parts import figure, page, section, table
from pipeline.evaluation.result import manifest_path
from pipeline.manifest import (
    CheckpointManifest,
    DatasetManifest,
    EvaluationManifest,
    ModelManifest,
    SourceManifest,
    SourceScore,
    TaskScore,
    TrainManifest,
)
from pipeline.model.shapes import count_parameters
from pipeline.storage import Storage
from pipeline.training.commits import folder_of
from pipeline.training.left_out import order_of
from pipeline.training.metrics import sound_files
from pipeline.workflow.duration import duration

TASK_HEAD = ["version", "few-shot", "documents", "metric", "value ± standard error"]

HELDOUT, REFERENCE_COMPRESSOR = "var(--series-1)", "xz -9"


def report_path(run_id: str) -> str:
    return f"runs/{run_id}/report.html"


def write_report(
    config: RunConfig,
    dataset: DatasetManifest,
    train: TrainManifest,
    checkpoint: CheckpointManifest,
    evaluation: EvaluationManifest,
    model: ModelManifest,
    storage: Storage,
    *,
    stage_seconds: Mapping[str, float],
) -> str:
    """Write the report of a finished run; returns its path below the storage root.

    `checkpoint`: the one that was evaluated and published, the last of the run or not. `stage_seconds` in order of stages.
    """
    records = read_metrics(train, storage)
    others = read_all(storage, config.run_id)
    text = render(config, dataset, train, checkpoint, evaluation, model, records, stage_seconds, others)
    storage.write(report_path(config.run_id), text.encode())
    return report_path(config.run_id)


def read_metrics(train: TrainManifest, storage: Storage) -> list[dict[str, Any]]:
    """The logged steps in order. A file that was lost or damaged since is named on stderr and left out."""
    found = {}
    for file in sound_files(storage, train.metrics):
        for line in storage.read(file.path).splitlines():
            record = json.loads(line)
            found[record["step"]] = record
    return [found[step] for step in sorted(found)]


def scored_sources(dataset: DatasetManifest, evaluation: EvaluationManifest) -> list[SourceManifest]:
    """The sources with a score, in the dataset's order."""
    return [source for source in dataset.sources if source.name in evaluation.sources]


def render(
    config: RunConfig,
    dataset: DatasetManifest,
    train: TrainManifest,
    checkpoint: CheckpointManifest,
    evaluation: EvaluationManifest,
    model: ModelManifest,
    records: list[dict[str, Any]],
    stage_seconds: Mapping[str, float],
    others: Sequence[EvaluationManifest] = (),
) -> str:
    """The page as text. `others`: the results of all of the run's checkpoints, oldest first."""
    body = [
        _head(config, model),
        _tiles(config, train, checkpoint, evaluation, stage_seconds),
        section("Training", _charts(records, checkpoint, evaluation)),
        section("Checkpoints", checkpoints(others)) if len(others) > 1 else "",
        section("Held-out text", _scores(dataset, evaluation)),
        section("Tasks", _tasks(evaluation)) if evaluation.tasks else "",
        section("Data", _data(config, dataset, checkpoint)),
        section("Stages", _stages(stage_seconds)) if stage_seconds else "",
        section("Artefacts", _artefacts(config, checkpoint, evaluation, model, dataset)),
        f"<details><summary>Configuration</summary><pre>{escape(dump_yaml(config))}</pre></details>",
    ]
    return page(f"{model.name} {model.version}", "".join(body))


# -- sections --------------------------------------------------------------------------------------------------------


def _head(config: RunConfig, model: ModelManifest) -> str:
    return f"<header><h1>{escape(model.name)}</h1><p>{escape(model.version)} · run {escape(config.run_id)}</p></header>"


def _tiles(
    config: RunConfig,
    train: TrainManifest,
    checkpoint: CheckpointManifest,
    evaluation: EvaluationManifest,
    stage_seconds: Mapping[str, float],
) -> str:
    overall, parameters = evaluation.overall, count_parameters(config.model)
    below = evaluation.unigram_entropy - overall.loss
    tiles = [
        ("held-out loss", f"{overall.loss:.3f}", f"nats per token, {abs(below):.2f} {'below' if below >= 0 else 'ABOVE'} unigram"),
        ("bits per byte", f"{overall.bits_per_byte:.3f}", f"{REFERENCE_COMPRESSOR}: {evaluation.baselines[REFERENCE_COMPRESSOR]:.3f}"),
        ("trained on", f"{compact(checkpoint.tokens_seen)} tokens", f"{_steps(train, checkpoint)}, {checkpoint.skipped_steps:,} skipped"),
        ("parameters", compact(parameters.total), f"{compact(parameters.active)} active per token"),
    ]  # fmt: skip
    if stage_seconds:
        tiles.append(("time", duration(sum(stage_seconds.values())), f"{len(stage_seconds)} stages"))
    cells = (
        f'<div class="tile"><span>{escape(name)}</span><strong>{escape(value)}</strong><small>{escape(note)}</small></div>'
        for name, value, note in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _steps(train: TrainManifest, checkpoint: CheckpointManifest) -> str:
    of_all = "" if checkpoint.step == train.steps else f"of {train.steps:,} "
    return f"{checkpoint.step:,} {of_all}steps"


def _charts(records: list[dict[str, Any]], checkpoint: CheckpointManifest, evaluation: EvaluationManifest) -> str:
    def points(name: str) -> list[Point]:
        return [(record["tokens"], record[name]) for record in records if record.get(name) is not None]

    heldout = Mark("held-out loss", evaluation.overall.loss, checkpoint.tokens_seen, HELDOUT)
    unigram = Mark("unigram entropy", evaluation.unigram_entropy)
    layers = max((len(record.get("load_imbalance", ())) for record in records), default=0)
    loads = [
        Series(
            f"mixture layer {layer + 1}",
            [(r["tokens"], r["load_imbalance"][layer]) for r in records if _known(r.get("load_imbalance", ()), layer)],
            _shade(layer, layers),
            1.6,
        )
        for layer in range(layers)
    ]
    figures = [
        ("Loss", "nats per token", [Series("training loss", points("loss"))], [heldout, unigram]),
        ("Gradient norm", "before clipping", [Series("gradient norm", points("gradient_norm"))], []),
        ("Learning rate", "", [Series("learning rate", points("learning_rate"))], []),
        ("Expert load", "busiest expert / mean, per mixture layer", loads, []),
    ]
    return '<div class="charts">' + "".join(figure(*each) for each in figures) + "</div>"


def _scores(dataset: DatasetManifest, evaluation: EvaluationManifest) -> str:
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


def _tasks(evaluation: EvaluationManifest) -> str:
    rows = [
        [escape(cell) for cell in (name, score.group or "", *cells)]
        for name, score in evaluation.tasks.items()
        for cells in task_cells(score)
    ]
    return (
        f"{table(['task', 'in group', *TASK_HEAD], rows, left=2)}<p class='note'>{escape(scored_how(evaluation))}</p>"
    )


def task_cells(score: TaskScore) -> list[list[str]]:
    """A row a metric, under TASK_HEAD."""
    shots = "" if score.few_shot is None else str(score.few_shot)
    return [[score.version, shots, f"{score.documents:,}", metric.label, metric.shown] for metric in score.metrics]


def scored_how(evaluation: EvaluationManifest) -> str:
    """What the tasks' values mean, in a sentence."""
    return (
        f"Scored with {evaluation.harness} on prompts that begin with an end-of-text token, contexts cut from the left to "
        f"{evaluation.sequence_length:,} tokens; text is generated greedily."
    )


def _data(config: RunConfig, dataset: DatasetManifest, checkpoint: CheckpointManifest) -> str:
    shares = order_of(config, dataset, checkpoint.left_out).shares(checkpoint.next_sequence)
    rows = [
        [
            escape(source.name),
            f"{shares[source.name]:.0%}",
            f"{source.counts.docs_in:,}",
            f"{source.counts.docs_out:,}",
            f"{source.counts.heldout:,}",
            f"{sum(source.counts.filtered.values()):,}",
            f"{sum(source.counts.quarantined.values()):,}",
            f"{compact(source.text_bytes)}B",
            compact(source.tokens),
            f"{source.rows:,}",
        ]
        for source in dataset.sources
    ]
    head = ["source", "share", "documents", "used", "held out", "filtered", "quarantined", "text", "tokens", "rows"]
    return table(head, rows)


def _stages(stage_seconds: Mapping[str, float]) -> str:
    longest = max(stage_seconds.values())
    rows = [
        [
            escape(name),
            duration(seconds),
            f'<div class="bar wide"><i style="width:{_share(seconds, longest)}"></i></div>',
        ]
        for name, seconds in stage_seconds.items()
    ]
    return table(["stage", "time", ""], rows)


def _artefacts(
    config: RunConfig,
    checkpoint: CheckpointManifest,
    evaluation: EvaluationManifest,
    model: ModelManifest,
    dataset: DatasetManifest,
) -> str:
    folder = f"../../models/{model.name}/{model.version}"
    step = checkpoint.step
    rows = [
        ("published model", f"{folder}/README.md", model.digest),
        ("files of the model", f"{folder}/manifest.json", model.digest),
        ("evaluation", manifest_path(config, checkpoint).removeprefix(f"runs/{config.run_id}/"), evaluation.digest),
        (
            f"checkpoint, step {step:,}",
            f"{folder_of(checkpoint).removeprefix(f'runs/{config.run_id}/')}/manifest.json",
            checkpoint.digest,
        ),
        ("weights in the checkpoint", "", checkpoint.content_sha256),
        ("dataset", f"../../datasets/{dataset.identity}/dataset.json", dataset.digest),
        ("tokenizer", f"../../{dataset.tokenizer.folder}/tokenizer.json", dataset.tokenizer.sha256),
        ("order of the data", "", checkpoint.order_digest),
        ("run", "", checkpoint.run_identity),
    ]
    cells = [
        [f'<a href="{escape(link, quote=True)}">{escape(name)}</a>' if link else escape(name), f"<code>{digest}</code>"]
        for name, link, digest in rows
    ]
    return table(["artefact", "sha256"], cells, left=2)


# -- parts -----------------------------------------------------------------------------------------------------------


def _bar(value: float, largest: float, colour: str, strong: bool = False) -> str:
    text = f"<b>{value:.3f}</b>" if strong else f"{value:.3f}"
    return f'{text}<div class="bar"><i style="width:{_share(value, largest)};background:{colour}"></i></div>'


def _share(value: float, largest: float) -> str:
    return f"{100 * value / (largest or 1.0):.1f}%"


def _known(values: Sequence[float | None], index: int) -> bool:
    return index < len(values) and values[index] is not None


def _shade(index: int, count: int) -> str:
    """From the first series' colour to the second's, over the depth of the network."""
    share = 100 * index / max(count - 1, 1)
    return f"color-mix(in oklab, var(--series-1) {share:.0f}%, var(--series-0))"
