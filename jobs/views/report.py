"""`moonlight report`: the page of a run, or several runs in one page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import open_run, parser, refusing
from jobs.views.runs import require_runs
from pipeline.report.compare import compare, comparison_path
from pipeline.report.page import render, report_path
from pipeline.report.run import Run, read_run


@refusing
def command(arguments: Sequence[str] | None) -> int:
    """`jobs.report`. Returns the exit code."""
    made = parser("report", "Write the page of a run, or lay several runs over each other.")
    made.add_argument("--output", type=Path, help="also write the page to this file of this machine")
    made.usage = (
        made.format_usage()
        .removeprefix("usage: ")
        .replace("[section.key=value ...]", "[RUN ...] [section.key=value ...]")
    )
    given = made.parse_args(arguments)
    overrides = [word for word in given.overrides if "=" in word]
    config, storage = open_run(given.config, overrides)
    wanted = list(dict.fromkeys(word for word in given.overrides if "=" not in word)) or [config.run_id]
    require_runs(storage, wanted)
    runs = [read_run(storage, run_id) for run_id in wanted]
    if len(runs) == 1:
        path, text = report_path(wanted[0]), render(runs[0])
    else:
        require_sound(runs)
        path, text = comparison_path(wanted), compare(runs)
    storage.write(path, text.encode())
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(text)
    for problem in runs[0].problems if len(runs) == 1 else ():
        print(problem, file=sys.stderr)
    print(given.output or storage.uri(path))
    return 0


def require_sound(runs: Sequence[Run]) -> None:
    """What is laid over each other is known whole. Raises ValueError that names a damaged record."""
    for run in runs:
        if run.problems:
            raise ValueError(f"run {run.run_id}: {run.problems[0]}")
        if run.config is None:
            raise ValueError(
                f"run {run.run_id}: it has no config.yaml to compare settings by; start the run once more with its configuration"
            )
