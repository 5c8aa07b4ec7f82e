"""Pictures of losses over tokens: of a model card, and of a run's checkpoints. Same numbers, same bytes.

Drawn on matplotlib's own defaults (a user's matplotlibrc is set aside), with the font that matplotlib ships, fixed size
and resolution, and without the metadata that names versions; no global state of pyplot is touched. matplotlib's settings are
one table of the process, so its threads draw one after the other: a picture that ends would take the settings from the next.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Iterator

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

Point = tuple[int, float]

_ONE_AT_A_TIME = threading.RLock()
INK, MUTED, TRAIN, HELDOUT = "#1f2933", "#7b8794", "#2563eb", "#d9480f"


def loss_plot(train: list[Point], heldout: Point, unigram_entropy: float, title: str) -> bytes:
    """PNG of (tokens seen, nats per token): the training curve, the held-out loss and the unigram entropy."""

    def draw(axes: Axes) -> None:
        _unigram(axes, unigram_entropy)
        if train:
            axes.plot(*zip(*train), color=TRAIN, linewidth=1.6, label="training loss")
        axes.plot(*heldout, marker="o", markersize=7, linestyle="none", color=HELDOUT, label="held-out loss")
        highest = all(loss <= heldout[1] for _, loss in train)  # then the legend is above it
        axes.annotate(
            f"{heldout[1]:.3f}",
            heldout,
            xytext=(-10, -14 if highest else 10),
            textcoords="offset points",
            ha="right",
            color=HELDOUT,
            weight="bold",
        )

    return _picture(draw, title)


def curves_plot(curves: dict[str, list[Point]], unigram_entropy: float, title: str) -> bytes:
    """PNG of held-out losses of one run's checkpoints, (tokens seen, nats per token) by source; the first is of all text."""

    def draw(axes: Axes) -> None:
        _unigram(axes, unigram_entropy)
        for index, (name, points) in enumerate(curves.items()):
            colour = HELDOUT if index == 0 else matplotlib.colormaps["viridis"](index / max(len(curves), 2))
            width = 2.2 if index == 0 else 1.2
            axes.plot(*zip(*points), color=colour, linewidth=width, marker="o", markersize=2 * width, label=name)

    return _picture(draw, title, below=min(len(curves), 4))


def _unigram(axes: Axes, entropy: float) -> None:
    axes.axhline(entropy, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
    axes.annotate(
        f"unigram entropy {entropy:.2f}",
        (1, entropy),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        color=MUTED,
    )


@contextlib.contextmanager
def same_settings() -> Iterator[None]:
    """While the block runs, matplotlib's settings are those of our pictures, whatever the user's are or another thread draws."""
    with _ONE_AT_A_TIME, matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK})
        yield


def _picture(draw: Callable[[Axes], None], title: str, below: int = 0) -> bytes:
    """`below`: columns of a legend below the axes; 0: two names beside the title."""
    with same_settings():
        figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_title(title, loc="left", color=INK, weight="bold")
        axes.set_xlabel("tokens seen", color=INK)
        axes.set_ylabel("loss (nats per token)", color=INK)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlim(left=0)
        axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#cbd2d9")
        axes.tick_params(colors=MUTED)
        if below:
            figure.legend(frameon=False, loc="outside lower center", ncols=below)
        else:
            axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.99), ncols=2, borderaxespad=0.2)
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
