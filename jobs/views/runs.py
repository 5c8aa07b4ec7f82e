"""The runs of a storage, a line each: where they stand, how far they are, and what they have used."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence

from jobs.cli import open_run, parser, refusing
from pipeline.report.run import Run, RunReader, run_ids
from pipeline.storage import Storage

HEAD = ("run", "state", "step", "loss", "held out", "last news", "by", "used", "cost")


@refusing
def command(arguments: Sequence[str] | None) -> int:
    """`jobs.runs`. Returns the exit code."""
    made = parser("runs", "List the runs of a storage.")
    made.add_argument("--price", type=price, help="of a GPU-hour: then what a run has cost is shown as well")
    given = made.parse_args(arguments)
    _, storage = open_run(given.config, given.overrides)
    found = [RunReader(storage, run_id, samples=False).read() for run_id in run_ids(storage)]
    print(f"{len(found)} runs in {storage.uri()}")
    for line in lines(found, given.price):
        print(line)
    for problem in [problem for run in found for problem in run.problems]:
        print(problem, file=sys.stderr)
    return 0


def price(text: str) -> float:
    """Raises argparse's error."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no price; give a number, as 2.5")
    return value


def lines(runs: Sequence[Run], price: float | None) -> Iterator[str]:
    """A table, the run with the newest news first."""
    ordered = sorted(runs, key=lambda run: -last_news(run))
    rows = [HEAD[: None if price is not None else -1], *(_row(run, price) for run in ordered)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows if ordered else ():
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()


def _row(run: Run, price: float | None) -> tuple[str, ...]:
    hours = gpu_hours(run)
    of_all = f"/{run.steps:,}" if run.steps else ""
    when = last_news(run)
    cells = (
        run.run_id,
        str(run.state),
        f"{run.step:,}{of_all}" if run.step else "",
        "" if run.loss is None else f"{run.loss:.4f}",
        "" if run.evaluation is None else f"{run.evaluation.overall.loss:.4f}",
        time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(when)) if when else "",
        run.who,
        _used(run, hours),
    )
    return cells if price is None else (*cells, "" if hours is None else f"{hours * price:,.2f}")


def last_news(run: Run) -> float:
    """UNIX time of the last thing that is known of the run; 0 if nothing is."""
    times = [event["time"] for event in run.events] + [attempt.last_time for attempt in run.history.attempts]
    return max([*times, run.progress.updated if run.progress else 0.0], default=0.0)


def gpu_hours(run: Run) -> float | None:
    """GPUs times hours of its stages, from their first event to their last, waiting between them not counted. None: it uses none, or
    its settings cannot be read."""
    if run.config is None or not run.config.cluster.use_gpu:
        return None
    ranks = run.config.parallelism.world_size
    gpus = {"train": ranks, "evaluate": ranks}
    return sum(gpus.get(attempt.stage, 0) * attempt.seconds(run.now) for attempt in run.attempts) / 3600


def _used(run: Run, hours: float | None) -> str:
    if hours is not None:
        return f"{hours:,.1f} GPU-h"
    seconds = sum(attempt.seconds(run.now) for attempt in run.attempts)
    return f"{seconds / 3600:,.2f} h" if seconds else ""


def require_runs(storage: Storage, wanted: Sequence[str]) -> None:
    """Raises ValueError for one that is not there, with those that are."""
    there = run_ids(storage)
    for run_id in wanted:
        if run_id not in there:
            raise ValueError(
                f"run {run_id}: there is no such run in {storage.uri()}; there are: {', '.join(there) or 'none'}"
            )
