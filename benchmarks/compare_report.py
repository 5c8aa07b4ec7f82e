"""What the comparison of optimizers says: a table, a plot, and ratios (see benchmarks/compare_optimizers.py).

`Contender` is one training run, `Curve` the held-out losses that it left. All losses are nats per token, lower is
better; a ratio is Muon's final loss over AdamW's.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipeline.model.shapes import ParameterCount
from pipeline.publishing.plots import same_settings

OPTIMIZERS = ("muon", "adamw")
TARGET = 1.0  # Muon's loss at most AdamW's
MUON, ADAMW, INK, MUTED = "#2563eb", "#d9480f", "#1f2933", "#7b8794"


@dataclass(frozen=True)
class Contender:
    """One training run."""

    optimizer: str
    hidden: int
    rate: float

    @property
    def name(self) -> str:
        return f"{self.optimizer} d={self.hidden} rate={self.rate:g}"


@dataclass(frozen=True)
class Curve:
    """What a finished run left behind."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]  # held-out, nats per token
    first_loss: float  # of the first training step: a function of initial weights and data alone
    order_digest: str

    @property
    def final(self) -> float:
        return self.losses[-1]


Curves = dict[Contender, Curve]


def best_rate(curves: Curves, optimizer: str, size: int) -> float:
    """The rate with the lowest final loss among this size's runs."""
    swept = {run: curve for run, curve in curves.items() if run.optimizer == optimizer and run.hidden == size}
    return min(swept, key=lambda run: swept[run].final).rate


def of_size(curves: Curves, size: int) -> list[Contender]:
    """Muon first, then AdamW, each by rate."""
    runs = (run for run in curves if run.hidden == size)
    return sorted(runs, key=lambda run: (OPTIMIZERS.index(run.optimizer), run.rate))


def table(curves: Curves, sizes: Mapping[int, ParameterCount], rate: float, step_tokens: int) -> str:
    """Markdown: held-out loss of every run at every scored step; `rate` is the common one."""
    points = next(iter(curves.values())).steps
    head = ["d", "parameters (active)", "optimizer", "rate", *(f"step {step:,}" for step in points), "Muon is there at"]
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(['--:', '--:', '---', '--:'] + ['--:'] * (len(points) + 1))}|"]
    for size, count in sizes.items():
        muon = curves[Contender("muon", size, rate)]
        for run in of_size(curves, size):
            mark = " (best)" if run.rate == best_rate(curves, run.optimizer, size) else ""
            cells = [str(size), f"{count.total / 1e6:.2f} M ({count.active / 1e6:.2f} M)", run.optimizer]
            cells += [f"{run.rate:g}{mark}", *(f"{loss:.3f}" for loss in curves[run].losses)]
            cells.append("" if run.optimizer == "muon" else passes(muon, curves[run].final))
            lines.append(f"| {' | '.join(cells)} |")
    about = (
        f"Held-out loss, nats per token; {points[-1]} steps of {step_tokens:,} tokens, one seed. Last column: the step at "
        f"which Muon at {rate:g} passes the row's final loss (interpolated; its schedule is not at its end there)."
    )
    return "\n".join(["", about, "", *lines])


def passes(curve: Curve, loss: float) -> str:
    """The step at which a curve first is as low as `loss`."""
    if curve.losses[0] <= loss:
        return f"before {curve.steps[0]}"
    points = list(zip(curve.steps, curve.losses))
    for (step, high), (next_step, low) in itertools.pairwise(points):
        if low <= loss:
            return f"{step + (next_step - step) * (high - loss) / (high - low):.0f}"
    return "never"


def plot(curves: Curves, sizes: Sequence[int], rate: float) -> bytes:
    """PNG of held-out loss over steps, one panel a size."""
    with same_settings():
        figure = Figure(figsize=(3.2 * len(sizes) + 0.8, 3.6), dpi=110, layout="constrained")
        panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
        for axes, size in zip(panels, sizes):
            for run in of_size(curves, size):
                label, colour, style = appearance(run, rate, run.rate == best_rate(curves, run.optimizer, size))
                axes.plot(curves[run].steps, curves[run].losses, style, color=colour, label=label, markersize=4)
            axes.set_title(f"hidden size {size}", loc="left", color=INK, weight="bold")
            axes.set_xlabel("step", color=INK)
            axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color("#cbd2d9")
            axes.tick_params(colors=MUTED)
            axes.legend(frameon=False, fontsize=8)
        panels[0].set_ylabel("held-out loss (nats per token)", color=INK)
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def appearance(run: Contender, rate: float, best: bool) -> tuple[str, str, str]:
    """Legend, colour and line style of a curve: solid at the common rate, dashed at its best, else dotted."""
    name, colour = ("Muon", MUON) if run.optimizer == "muon" else ("AdamW", ADAMW)
    if run.rate != rate and not best:
        return f"_{name} {run.rate:g}", colour, ":"  # the underscore keeps it out of the legend
    return f"{name} {run.rate:g}{' (its best)' if best else ''}", colour, "o-" if run.rate == rate else "s--"


def results(curves: Curves, sizes: Sequence[int], rate: float) -> list[dict[str, Any]]:
    """Three per size: at the same rate, against AdamW at its best rate, and both at their best."""
    found = []
    for size in sizes:
        muon_best, adamw_best = (best_rate(curves, name, size) for name in OPTIMIZERS)
        kinds = {
            "same_rate": (rate, rate),
            "adamw_best_rate": (rate, adamw_best),
            "both_best_rate": (muon_best, adamw_best),
        }
        for kind, (rate_ours, rate_peer) in kinds.items():
            ours = curves[Contender("muon", size, rate_ours)].final
            peer = curves[Contender("adamw", size, rate_peer)].final
            found.append(
                {
                    "benchmark": f"compare_optimizers/{size}/{kind}",
                    "ours": ours,
                    "peer": peer,
                    "ratio": round(ours / peer, 4),
                    "target": TARGET,
                    "met": ours / peer <= TARGET,
                    "unit": "held-out nats per token; lower is better",
                    "rate_ours": rate_ours,
                    "rate_peer": rate_peer,
                }
            )
    return found
