"""The charts of a run's training, over tokens and over wall time, from its journal and its evaluations.

What a field has no value for has no chart: a run of an older version, on CPUs, or without a phase's clock shows the others.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from html import escape
from typing import Any

from pipeline.manifest import EvaluationManifest
from pipeline.report.charts import Axis, Mark, Moment, Series, clock
from pipeline.report.parts import TOKENS, figure, table
from pipeline.report.run import Run
from pipeline.training.journal import History
from pipeline.workflow.duration import duration

WALL = Axis("wall time since training began", clock, "time")
PHASES = {  # of a step, in seconds, and how they are called
    "seconds_data": ("waiting for data", "#ca8a04"),
    "seconds_compute": ("forward and backward", "var(--series-0)"),
    "seconds_exchange": ("exchange that is not hidden", "#a855f7"),
    "seconds_optimizer": ("optimizer", "#0d9488"),
    "seconds_save": ("saving", "#db2777"),
    "seconds_other": ("other", "#64748b"),
}
HELDOUT = "var(--series-1)"
Places = Sequence[tuple[Axis, Sequence[float | None]]]  # of each axis where the logged steps are on it


def training(run: Run) -> str:
    """All charts, with what the strokes in them mean. Empty before the first logged step."""
    steps = run.history.steps
    if not steps:
        return ""
    places = axes_of(run.history)
    moments = {axis: _moments(run, axis, where) for axis, where in places}

    def chart(title: str, unit: str, lines: dict[Axis, list[Series]], marks: Sequence[Mark] = (), **more: Any) -> str:
        return figure(title, unit, lines, marks, moments, **more)

    def of(name: str, title: str, unit: str, **more: Any) -> str:
        return chart(title, unit, {axis: [Series(title, curve(steps, where, name))] for axis, where in places}, **more)

    charts = [
        chart("Loss", "nats per token", *_losses(run, places)),
        of("gradient_norm", "Gradient norm", "before clipping"),
        of("learning_rate", "Learning rate", "per step"),
        of("bias_rate", "Bias rate of the router", "per step"),
        of("global_batch", "Batch", "sequences"),
        of("tokens_per_second", "Throughput", "tokens per second, all ranks"),
        of("mfu", "MFU", "share of the peak FLOP/s", y=Axis("share of the peak FLOP/s", lambda value: f"{value:.1%}")),
        of("memory_peak_bytes", "Memory", "peak of a rank, GB", y=Axis("peak of a rank, GB", lambda value: f"{value / 1e9:.3g}")),
        chart("Expert load", "busiest expert / mean of its layer", {axis: _loads(steps, where) for axis, where in places}),
        chart("Skipped steps and spikes", "since the run began", {axis: _counts(steps, where) for axis, where in places}),
        chart("Where a step's time goes", "seconds, mean over ranks", {axis: _phases(steps, where) for axis, where in places}),
        of("slowest_seconds", "Slowest rank", "seconds of a step more than the others' mean"),
    ]  # fmt: skip
    return f'{_key(run)}<div class="charts">{"".join(charts)}</div>{_restarts(run)}'


def switch(run: Run) -> str:
    """Which x axis: tokens, or wall time where the journal has it."""
    return timed_switch(_timed(run.history))


def timed_switch(timed: bool) -> str:
    """Nothing to choose where no time is known."""
    if not timed:
        return ""
    return (
        '<div class="switch"><label><input type="radio" name="axis" value="tokens" checked>tokens</label>'
        '<label><input type="radio" name="axis" value="time">wall time</label></div>'
    )


def axes_of(history: History) -> Places:
    """Where the logged steps stand: on the axis of tokens, and on that of wall time if their times are known."""
    found: list[tuple[Axis, Sequence[float | None]]] = [(TOKENS, [line.get("tokens") for line in history.steps])]
    if _timed(history):
        begun = _begun(history)
        found.append((WALL, [line["time"] - begun for line in history.steps]))
    return found


def curve(steps: Sequence[dict[str, Any]], where: Sequence[float | None], name: str) -> list[tuple[float, float]]:
    """A figure of the logged steps that have it."""
    return [
        (float(x), float(line[name]))
        for x, line in zip(where, steps, strict=True)
        if x is not None and isinstance(line.get(name), int | float)
    ]


def heldout(
    evaluations: Sequence[EvaluationManifest], steps: Sequence[dict[str, Any]], where: Sequence[float | None]
) -> list[tuple[float, float]]:
    """Held-out losses at the places of their steps on an axis."""
    found = ((_at(each.step, steps, where), each.overall.loss) for each in evaluations)
    return sorted((x, loss) for x, loss in found if x is not None)


def _losses(run: Run, places: Places) -> tuple[dict[Axis, list[Series]], list[Mark]]:
    steps, lines = run.history.steps, {}
    judged = run.evaluations or ((run.evaluation,) if run.evaluation else ())
    for axis, where in places:
        loss = curve(steps, where, "loss")
        scored = heldout(judged, steps, where)
        if axis is TOKENS:  # known exactly
            scored = sorted((float(each.tokens_seen or 0), each.overall.loss) for each in judged)
        spikes = _grown(steps, where, "spikes")
        lines[axis] = [
            Series("training", loss),
            Series("held out", scored, HELDOUT, 2.6, dots=True),
            Series("spike", [(x, y) for x, y in loss if x in spikes], "#db2777", dots=True, line=False),
        ]
    marks = [Mark("unigram entropy", run.evaluation.unigram_entropy)] if run.evaluation else []
    return lines, marks


def _grown(steps: Sequence[dict[str, Any]], where: Sequence[float | None], name: str) -> set[float]:
    """Where a count is larger than at the logged step before."""
    found, before = set(), 0
    for x, line in zip(where, steps, strict=True):
        count = line.get(name) or 0
        if count > before and x is not None:
            found.add(float(x))
        before = count
    return found


def _loads(steps: Sequence[dict[str, Any]], where: Sequence[float | None]) -> list[Series]:
    layers = max((len(line.get("load_imbalance") or ()) for line in steps), default=0)
    return [
        Series(f"mixture layer {layer + 1}", _load(steps, where, layer), _shade(layer, layers), 1.6)
        for layer in range(layers)
    ]


def _load(steps: Sequence[dict[str, Any]], where: Sequence[float | None], layer: int) -> list[tuple[float, float]]:
    found = []
    for x, line in zip(where, steps, strict=True):
        loads = line.get("load_imbalance") or ()
        if x is not None and layer < len(loads) and loads[layer] is not None:
            found.append((float(x), float(loads[layer])))
    return found


def _counts(steps: Sequence[dict[str, Any]], where: Sequence[float | None]) -> list[Series]:
    return [
        Series("skipped", curve(steps, where, "skipped_steps"), HELDOUT),
        Series("spikes", curve(steps, where, "spikes"), "#db2777"),
    ]


def _phases(steps: Sequence[dict[str, Any]], where: Sequence[float | None]) -> list[Series]:
    return [Series(title, curve(steps, where, name), colour, 1.6) for name, (title, colour) in PHASES.items()]


def _moments(run: Run, axis: Axis, where: Sequence[float | None]) -> list[Moment]:
    """Restarts and checkpoints on an axis; over tokens a restart is at the step it went on from, over time when it began."""
    steps, found = run.history.steps, []
    for attempt in run.history.attempts[1:]:
        x = _at(attempt.from_step, steps, where) if attempt.from_step else 0.0
        if axis is WALL:
            x = attempt.time - _begun(run.history)
        if x is not None:
            found.append(Moment(f"restart: went on from step {attempt.from_step:,}", x))
    for step in saved_steps(run):
        x = _at(step, steps, where)
        if x is not None:
            found.append(Moment(f"checkpoint of step {step:,}", x, small=True))
    return found


def saved_steps(run: Run) -> list[int]:
    """Steps of checkpoints that training had committed, gone meanwhile or not."""
    found = {line["checkpoint_step"] for line in run.history.steps if line.get("checkpoint_step")}
    found |= {attempt.from_step for attempt in run.history.attempts if attempt.from_step}
    return sorted(found | ({run.checkpoint.step} if run.checkpoint and not run.checkpoint.average_of else set()))


def _at(step: int, steps: Sequence[dict[str, Any]], where: Sequence[float | None]) -> float | None:
    """The place of a step, between those of the logged steps around it; None outside of what is logged."""
    place = bisect_left(steps, step, key=lambda line: line["step"])
    if place == len(steps):
        return None
    right = where[place]
    if steps[place]["step"] == step or right is None:
        return right
    left = where[place - 1] if place else 0.0
    before = steps[place - 1]["step"] if place else 0
    if left is None:
        return right
    return left + (right - left) * (step - before) / (steps[place]["step"] - before)


def _key(run: Run) -> str:
    """What the strokes mean, where there are any."""
    words = ['<span><i class="stroke small"></i>checkpoint</span>'] if saved_steps(run) else []
    words += ['<span><i class="stroke"></i>restart</span>'] if len(run.history.attempts) > 1 else []
    return f'<div class="legend key">{"".join(words)}</div>' if words else ""


def _restarts(run: Run) -> str:
    """A row an attempt of training, where there was more than one."""
    attempts = run.history.attempts
    if len(attempts) < 2:
        return ""
    rows = [
        [
            str(number),
            f"{attempt.from_step:,}",
            f"{attempt.last_step:,}",
            f"{attempt.ranks:,}",
            duration(attempt.last_time - attempt.time),
            "" if number == 1 else duration(attempt.time - attempts[number - 2].last_time),
        ]
        for number, attempt in enumerate(attempts, start=1)
    ]
    head = ["start of training", "from step", "to step", "ranks", "logged for", "nothing logged before"]
    note = f"{run.history.repeated:,} logged steps were done again after a restart." if run.history.repeated else ""
    return f"{table([escape(each) for each in head], rows)}<p class='note'>{note}</p>"


def _timed(history: History) -> bool:
    return bool(history.steps) and all("time" in line for line in history.steps)


def _begun(history: History) -> float:
    first: float = history.steps[0]["time"]
    return min([first, *(attempt.time for attempt in history.attempts)])


def _shade(index: int, count: int) -> str:
    """From the first series' colour to the second's, over the depth of the network."""
    share = 100 * index / max(count - 1, 1)
    return f"color-mix(in oklab, var(--series-1) {share:.0f}%, var(--series-0))"
