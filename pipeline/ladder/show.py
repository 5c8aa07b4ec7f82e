"""What a ladder found: lines for people, and a plot of loss over compute beside the paper's claim."""

from __future__ import annotations

import io
from collections.abc import Iterator

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipeline.ladder.climb import Climbed
from pipeline.ladder.fit import LEVEL, PAPER_SHARE

COLOURS = {"muon": "#2563eb", "adamw": "#d9480f"}
TITLES = {"muon": "Muon", "adamw": "AdamW"}


def lines(climbed: Climbed) -> Iterator[str]:
    for name, fit in climbed.fits.items():
        rates = ", ".join(f"d={size}: {rate:.3g}" for size, rate in climbed.rates[name].items())
        yield (
            f"{TITLES[name]:<6} L = {fit.law.coefficient:.4g} C^-{fit.law.exponent:.4f}, exponent {fit.exponent}; "
            f"rate times the recipe's: {rates}; batch: {climbed.batch[name]:g}"
        )
    yield (
        f"share of AdamW's FLOPs that Muon needs for the same loss at {climbed.at:.2g} FLOPs: {climbed.share} ({LEVEL:.0%} interval); "
        f"the paper's, of far larger runs, is {PAPER_SHARE}"
    )


def plot(climbed: Climbed) -> bytes:
    """PNG."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(7.2, 4.4), dpi=110, layout="constrained")
        axes = figure.subplots()
        for name, points in climbed.points.items():
            flops = np.array([point.flops for point in points])
            grid = np.geomspace(flops.min(), flops.max(), 40)
            bands = [climbed.fits[name].band(float(each)) for each in grid]
            axes.fill_between(
                grid, [b.low for b in bands], [b.high for b in bands], color=COLOURS[name], alpha=0.15, lw=0
            )
            axes.plot(grid, [b.value for b in bands], color=COLOURS[name], label=f"{TITLES[name]}, fitted")
            axes.plot(flops, [point.loss for point in points], "o", color=COLOURS[name], markersize=4)
        peer = climbed.fits["adamw"].law
        spent = [point.flops for point in climbed.points["adamw"]]
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
        axes.set_xlabel("training FLOPs")
        axes.set_ylabel("held-out loss (nats per token)")
        axes.set_title(f"Muon needs {climbed.share} of AdamW's FLOPs", loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
