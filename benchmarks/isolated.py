"""The rows of a report, measured in a child process that is replaced when a row breaks it.

A kernel that reads where it may not, a compiler that crashes or hangs, memory that is not given back: in one process the
first such row costs all rows after it, since a CUDA context that has failed stays failed. Here the parent only reads what
the child prints, line by line, and prints it on. A row that raises, ends its process or takes more than `row_s` is
reported, and a new child goes on with the next one; rows that would begin after `budget_s` are left out. So a report ends
within `budget_s + row_s`, and whatever was measured has been printed by then. Starting a child again takes the time of
its imports.

A row is a function without arguments that prints its line for people and returns a record, which is printed as a line of
JSON, or None.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

MARK = "#row "  # begins the child's line that says which row begins
START_S = 300.0  # a child may take to begin
TOLD = 3  # the child's exit code after a row that failed and said why
Row = Callable[[], dict[str, Any] | None]


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


def show(line: str) -> None:
    print(line, flush=True)


def measure_rows(rows: Mapping[str, Row], first: int) -> None:
    """The child: all rows from number `first` on, in order. Exits with TOLD after one that fails, unless for memory alone."""
    for number, (name, row) in enumerate(rows.items()):
        if number < first:
            continue
        show(f"{MARK}{number}")
        try:
            record = row()
        except torch.OutOfMemoryError as error:
            show(f"{name:32} not measured: {first_line(error)}")
        except Exception as error:
            traceback.print_exc()
            show(f"{name:32} not measured: {first_line(error)}")
            sys.exit(TOLD)
        else:
            if record is not None:
                show(json.dumps(record))


def report(child: Sequence[str], names: Sequence[str], *, budget_s: float, row_s: float) -> list[dict[str, Any]]:
    """The parent: runs `child` (a command, to which the number of its first row is added) until all rows are done.

    Returns the records. Raises RuntimeError if a child ends before it has begun a row.
    """
    end = time.monotonic() + budget_s
    records: list[dict[str, Any]] = []
    number = 0
    while number < len(names):
        if time.monotonic() >= end:
            show(f"left out, more than {budget_s:.0f} s have passed: {', '.join(names[number:])}")
            break
        number = _run([*child, str(number)], names, number, end, row_s, records)
    return records


def _run(
    command: Sequence[str], names: Sequence[str], number: int, end: float, row_s: float, records: list[dict[str, Any]]
) -> int:
    """One child; returns the number of the row that is next."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    begun = late = False
    watch = threading.Timer(START_S, _kill, [process.pid])
    watch.start()
    try:
        for line in process.stdout:
            line = line.rstrip("\n")
            if line.startswith(MARK):
                number, begun = int(line.removeprefix(MARK)), True
                watch.cancel()
                late = time.monotonic() >= end
                if late:
                    break
                started = time.monotonic()
                watch = threading.Timer(row_s, _kill, [process.pid])
                watch.start()
                continue
            if line.startswith("{"):
                records.append(json.loads(line))
            show(line)
        else:
            process.wait()
    finally:  # also when the report is interrupted: nothing goes on behind its back
        watch.cancel()
        _kill(process.pid)
        code = process.wait()
        process.stdout.close()
    if late:
        return number
    if code == 0:
        return len(names)
    if not begun:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {code} before its first row")
    if code != TOLD:
        slow = time.monotonic() - started >= row_s
        why = f"took more than {row_s:.0f} s" if slow else f"its process ended with exit code {code}"
        show(f"{names[number]:32} not measured: {why}")
    return number + 1


def _kill(session: int) -> None:
    """The child and the compilers it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)
