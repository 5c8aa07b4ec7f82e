"""Runs laid over each other: the same chart of all of them in one plot, and exactly the settings in which they differ."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pipeline.report.charts import Axis, Series, compact
from pipeline.report.parts import figure, page, section, table
from pipeline.report.run import Run
from pipeline.report.training import WALL, axes_of, curve, heldout, timed_switch
from pipeline.workflow.duration import duration

COLOURS = ("#2563eb", "#d9480f", "#0d9488", "#a855f7", "#ca8a04", "#db2777", "#64748b", "#65a30d")
AGAIN_S = 15
UNIT = {  # of the figures that are compared: title and axis
    "gradient_norm": ("Gradient norm", "before clipping"),
    "learning_rate": ("Learning rate", "per step"),
    "bias_rate": ("Bias rate of the router", "per step"),
    "global_batch": ("Batch", "sequences"),
    "tokens_per_second": ("Throughput", "tokens per second, all ranks"),
    "mfu": ("MFU", "share of the peak FLOP/s"),
    "memory_peak_bytes": ("Memory", "peak of a rank, bytes"),
    "expert_load": ("Expert load", "busiest expert of any layer / mean"),
    "seconds_data": ("Waiting for data", "seconds of a step"),
}
NOT_SETTINGS = ("run_id", "storage")  # what a run is called and where it lies


def comparison_path(run_ids: Sequence[str]) -> str:
    """`reports/a_b.html`; of many runs a digest of their names."""
    name = "_".join(run_ids)
    if len(name) > 100:
        name = f"{len(run_ids)}-runs-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return f"reports/{name}.html"


def compare(runs: Sequence[Run]) -> str:
    """The page of several runs. Raises ValueError for runs that share nothing to lay over each other."""
    if len(runs) > len(COLOURS):
        raise ValueError(f"{len(runs)} runs are too many to tell apart in a plot; give at most {len(COLOURS)}")
    charts = _charts(runs)
    if not charts:
        nothing = [run.run_id for run in runs if not run.history.steps]
        raise ValueError(
            f"runs {', '.join(run.run_id for run in runs)} share nothing to lay over each other: "
            f"{', '.join(nothing)} {'has' if len(nothing) == 1 else 'have'} no logged step yet; train first, or leave out"
        )
    names = "".join(
        f'<span><i style="background:{colour}"></i>{escape(run.run_id)}</span>' for run, colour in zip(runs, COLOURS)
    )
    written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(max(run.now for run in runs)))
    note = "" if len(_tokenizers(runs)) < 2 else _other_tokenizers(runs)
    body = [
        f"<header><h1>{len(runs)} runs</h1><p>as of {written}</p></header>",
        f'<div class="legend key">{names}</div>',
        section("Where they stand", _standing(runs)),
        section("Settings in which they differ", _settings(runs)),
        section(
            "Training", note + f'<div class="charts">{charts}</div>', timed_switch(any(_timed(run) for run in runs))
        ),
    ]
    return page(" · ".join(run.run_id for run in runs), "".join(body))


def differing(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Settings by their keys with a value a run, of those that are not the same in all. `settings`: by run; a key that a run has not
    is '—'."""
    flat = {name: dict(_flattened("", values)) for name, values in settings.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    rows = {key: [values.get(key, "—") for values in flat.values()] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}


def _flattened(prefix: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        found = []
        for key, inner in value.items():
            if not prefix and key in NOT_SETTINGS:
                continue
            found += _flattened(f"{prefix}.{key}" if prefix else str(key), inner)
        return found
    if isinstance(value, list) and any(isinstance(each, Mapping | list) for each in value):
        return [pair for index, each in enumerate(value) for pair in _flattened(f"{prefix}[{index}]", each)]
    return [(prefix, value if isinstance(value, str) else json.dumps(value))]


def _settings(runs: Sequence[Run]) -> str:
    rows = [
        [escape(key), *(f"<code>{escape(value)}</code>" for value in values)]
        for key, values in differing(
            {run.run_id: run.config.model_dump(mode="json") for run in runs if run.config}
        ).items()
    ]
    if not rows:
        return "<p class='note'>None: they have the same settings.</p>"
    return table(["setting", *(escape(run.run_id) for run in runs)], rows, left=1 + len(runs))


def _standing(runs: Sequence[Run]) -> str:
    rows = []
    for run, colour in zip(runs, COLOURS):
        last = run.history.steps[-1] if run.history.steps else {}
        rate = last.get("tokens_per_second")
        seconds = sum(attempt.seconds(run.now) for attempt in run.attempts if attempt.stage == "train")
        overall = None if run.evaluation is None else run.evaluation.overall
        rows.append(
            [
                f'<i class="swatch" style="background:{colour}"></i><a href="../runs/{run.run_id}/report.html">{escape(run.run_id)}</a>',
                escape(str(run.state)),
                f"{run.step:,}",
                compact(last.get("tokens") or 0),
                "" if run.loss is None else f"{run.loss:.4f}",
                "" if overall is None else f"{overall.loss:.4f}",
                "" if overall is None else f"{overall.bits_per_byte:.4f}",
                "" if rate is None else compact(rate),
                duration(seconds) if seconds else "",
            ]
        )
    head = ["run", "state", "step", "tokens", "loss", "held out", "bits per byte", "tokens/s", "training"]
    return table(head, rows, left=2)


def _charts(runs: Sequence[Run]) -> str:
    made = []
    if len(_tokenizers(runs)) < 2:
        made.append(_chart(runs, "Loss", "nats per token", lambda run, where: curve(run.history.steps, where, "loss")))
        made.append(_chart(runs, "Held-out loss", "nats per token", _scored, dots=True))
    for name, (title, unit) in UNIT.items():
        made.append(_chart(runs, title, unit, lambda run, where, name=name: curve(run.history.steps, where, name)))
    return "".join(made)


def _chart(runs: Sequence[Run], title: str, unit: str, points: Any, *, dots: bool = False) -> str:
    """Empty unless two runs have something to show in it."""
    views: dict[Axis, list[Series]] = {}
    for run, colour in zip(runs, COLOURS):
        for axis, where in axes_of(run.history):
            found = points(run, where)
            if found:
                views.setdefault(axis, []).append(Series(run.run_id, found, colour, 1.8, dots=dots))
    shown = {axis: lines for axis, lines in views.items() if len(lines) > 1}
    return figure(title, unit, shown) if shown else ""


def _scored(run: Run, where: Sequence[float | None]) -> list[tuple[float, float]]:
    judged = run.evaluations or ((run.evaluation,) if run.evaluation else ())
    return heldout(judged, run.history.steps, where)


def _timed(run: Run) -> bool:
    return any(axis is WALL for axis, _ in axes_of(run.history))


def _tokenizers(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Runs by the digest of their tokenizer, where it is known."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if run.dataset is not None:
            found.setdefault(run.dataset.tokenizer.sha256, []).append(run.run_id)
    return found


def _other_tokenizers(runs: Sequence[Run]) -> str:
    groups = "; ".join(f"{', '.join(names)}: {sha256[:12]}" for sha256, names in _tokenizers(runs).items())
    return (
        f"<p class='note'>Losses per token are not laid over each other: the tokenizers differ ({escape(groups)}). "
        "Bits per byte of the same text compare.</p>"
    )
