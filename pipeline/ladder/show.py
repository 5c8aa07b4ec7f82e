"""What a ladder found: tables for people, and a plot of loss over compute beside the paper's claim."""

from __future__ import annotations

import io
from collections.abc import Iterator

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipeline.ladder.climb import Climbed
from pipeline.ladder.fit import LEVEL, PAPER_SHARE
from pipeline.ladder.rungs import OPTIMIZERS, Rung

COLOURS = {"muon": "#2563eb", "adamw": "#d9480f"}
TITLES = {"muon": "Muon", "adamw": "AdamW"}


def lines(climbed: Climbed) -> Iterator[str]:
    """Two tables in Markdown, of held-out losses (nats per token), and the fit."""
    yield from _sweeps(climbed)
    yield ""
    yield from _sizes(climbed)
    yield ""
    for name, fit in climbed.fits.items():
        yield (
            f"{TITLES[name]:<6} L = {fit.law.coefficient:.4g} C^-{fit.law.exponent:.4f}, exponent {fit.exponent}; "
            f"batch times the recipe's: {climbed.batch[name]:g}"
        )
    yield (
        f"share of AdamW's FLOPs that Muon needs for the same loss at {climbed.at:.2g} FLOPs: {climbed.share} ({LEVEL:.0%} interval); "
        f"the paper's, of far larger runs, is {PAPER_SHARE}"
    )


def _sweeps(climbed: Climbed) -> Iterator[str]:
    """One seed, the recipe's batch: what each optimizer makes of a rate, so also both at equal ones."""
    rates = sorted({rate for sizes in climbed.swept.values() for tried in sizes.values() for rate in tried})
    yield "| swept: d | optimizer | " + " | ".join(f"{rate:g}" for rate in rates) + " |"
    yield "|--:|---|" + "--:|" * len(rates)
    for size in climbed.swept["adamw"]:
        for name in OPTIMIZERS:
            found = [climbed.measured.get(Rung(name, size, rate)) for rate in rates]
            losses = ["" if each is None else f"{each.loss:.3f}" for each in found]
            yield f"| {size} | {TITLES[name]} | " + " | ".join(losses) + " |"


def _sizes(climbed: Climbed) -> Iterator[str]:
    """Mean of the seeds, and half their range."""
    yield "| d | FLOPs | " + " | ".join(f"{TITLES[name]} | at rate" for name in OPTIMIZERS) + " | ratio |"
    yield "|--:|--:|" + "--:|--:|" * len(OPTIMIZERS) + "--:|"
    for size in climbed.rates["adamw"]:
        cells, means = [], []
        for name in OPTIMIZERS:
            found = [climbed.measured[rung] for rung in climbed.seeds[name] if rung.hidden == size]
            losses = [each.loss for each in found]
            means.append(sum(losses) / len(losses))
            cells.append(f"{means[-1]:.3f} ± {(max(losses) - min(losses)) / 2:.3f} | {climbed.rates[name][size]:.3g}")
        yield f"| {size} | {found[0].flops:.2e} | {' | '.join(cells)} | {means[0] / means[1]:.3f} |"


def plot(climbed: Climbed) -> bytes:
    """PNG."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(7.2, 4.4), dpi=110, layout="constrained")
        axes = figure.subplots()
        for name in OPTIMIZERS:
            points = climbed.points(name)
            flops = np.array([point.flops for point in points])
            grid = np.geomspace(flops.min(), flops.max(), 40)
            bands = [climbed.fits[name].band(float(each)) for each in grid]
            if climbed.fits[name].laws:
                low, high = (np.array([getattr(band, end) for band in bands], float) for end in ("low", "high"))
                axes.fill_between(grid, low, high, color=COLOURS[name], alpha=0.15, lw=0)
            axes.plot(grid, [b.value for b in bands], color=COLOURS[name], label=f"{TITLES[name]}, fitted")
            axes.plot(flops, [point.loss for point in points], "o", color=COLOURS[name], markersize=4)
        peer = climbed.fits["adamw"].law
        spent = [point.flops for point in climbed.points("adamw")]
        flops = np.geomspace(min(spent), max(spent), 40)
        axes.plot(
            flops * PAPER_SHARE,
            [peer.loss(float(each)) for each in flops],
            "--",
            color="#7b8794",
            label=f"{PAPER_SHARE} of AdamW's compute (the paper)",
        )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_xlabel("training FLOPs")
        axes.set_ylabel("held-out loss (nats per token)")
        axes.set_title(f"Muon needs {climbed.share} of AdamW's FLOPs", loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
