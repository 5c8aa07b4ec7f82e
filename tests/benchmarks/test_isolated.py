"""Rows that raise, die or hang cost themselves only."""

import os
import sys
import time

import pytest
import torch

from benchmarks.isolated import measure_rows, report


def fails():
    raise ValueError("no such kernel\nand a long story")


def out_of_memory():
    raise torch.OutOfMemoryError("too large")


ROWS = {
    "good": lambda: {"benchmark": "good", "pid": os.getpid()},
    "full": out_of_memory,
    "same process": lambda: {"benchmark": "same process", "pid": os.getpid()},
    "fails": fails,
    "dies": lambda: os.abort(),
    "hangs": lambda: time.sleep(1000),
    "last": lambda: print("a line for people"),
}


def child(rows="ROWS") -> list[str]:
    program = f"import sys; from tests.benchmarks.test_isolated import *; measure_rows({rows}, int(sys.argv[1]))"
    return [sys.executable, "-c", program]


def test_only_the_bad_rows_are_missing(capfd):
    records = report(child(), list(ROWS), budget_s=1e6, row_s=10)
    assert [record["benchmark"] for record in records] == ["good", "same process"]
    assert records[0]["pid"] == records[1]["pid"]  # running out of memory needs no new process
    lines = capfd.readouterr().out.splitlines()
    assert [line.split("not measured: ")[1] for line in lines if "not measured" in line] == [
        "OutOfMemoryError: too large",
        "ValueError: no such kernel",
        "its process ended with exit code -6",
        "took more than 10 s",
    ]
    assert lines[-1] == "a line for people"


def test_rows_beyond_the_budget_are_left_out(capfd):
    assert report(child(), ["a", "b"], budget_s=0, row_s=20) == []
    assert capfd.readouterr().out == "left out, more than 0 s have passed: a, b\n"


def test_a_child_that_cannot_start_ends_the_report():
    with pytest.raises(RuntimeError, match="ended with exit code 1 before its first row"):
        report([sys.executable, "-c", "raise SystemExit(1)"], ["a"], budget_s=1e6, row_s=20)


def test_the_child_runs_in_order_from_a_row_on(capfd):
    measure_rows({name: ROWS[name] for name in ("good", "full", "last")}, 1)
    lines = capfd.readouterr().out.splitlines()
    assert [lines[0], lines[2]] == ["#row 1", "#row 2"]
