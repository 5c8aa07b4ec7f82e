"""The table of faults: which rows there are, what each run of one found, and how it stands in docs/reliability.md.

    @fault("disk full on one rank")
    def test_disk_full(place, row): ...          # one row a place, `folder` and `s3`

    @fault("killed in a save", cases=MOMENTS)
    def test_killed(place, case, row): ...       # one row a case and place

A test says what it found in `row`; only what passed gets into the document. Times and steps are what was seen on the machine of
that run, and nothing is asserted about them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
DOCUMENT = REPOSITORY / "docs" / "reliability.md"
BEGIN, END = "<!-- rows: begin (make test-faults) -->", "<!-- rows: end -->"
HEAD = ("Fault", "Storage", "What happened", "Same bytes", "Steps lost", "Seconds lost")
PLACES = ("folder", "s3")
NOT_RUN = "not run yet"
LIMIT_S = 1800  # for a row: several starts of a run


@dataclass
class Row:
    """One line of the table, filled in by its test."""

    fault: str
    place: str
    happened: str = ""
    same: str = ""  # yes, or how not
    steps: int | None = None  # trained again; None: none to lose
    seconds: float | None = None  # from the fault until the run is where it had been

    @property
    def key(self) -> tuple[str, str]:
        return self.fault, self.place

    def cells(self) -> tuple[str, ...]:
        steps = "-" if self.steps is None else str(self.steps)
        seconds = "-" if self.seconds is None else f"{self.seconds:.0f}"
        return self.fault, self.place, self.happened, self.same, steps, seconds


def fault(
    name: str, *, cases: Iterable[str] = (), places: Sequence[str] = PLACES, quick: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Any]:
    """Mark a test as rows of the table. `quick`: of these the ones that the default group runs, as "place" or "case@place"."""
    cases = tuple(cases)

    def mark(test: Callable[..., None]) -> Any:
        def param(*values: str) -> Any:
            return pytest.param(*values, marks=[pytest.mark.quick] if "@".join(values) in quick else [])

        if cases:
            rows = [param(case, place) for case in cases for place in places]
            test = pytest.mark.parametrize(("case", "place"), rows, indirect=["place"])(test)
        else:
            test = pytest.mark.parametrize("place", [param(place) for place in places], indirect=True)(test)
        return pytest.mark.timeout(LIMIT_S)(pytest.mark.faults(name, cases, tuple(places))(test))

    return mark


def row_name(name: str, case: str | None) -> str:
    return f"{name}: {case}" if case else name


def rows_of_tests() -> Iterator[tuple[str, str]]:
    """(fault, place) of every row that some test here has, in the order of the files and their lines."""
    package = importlib.import_module("tests.faults")
    for found in sorted(pkgutil.iter_modules(package.__path__), key=lambda module: module.name):
        if not found.name.startswith("test_"):
            continue
        module = importlib.import_module(f"tests.faults.{found.name}")
        for test in vars(module).values():
            for mark in getattr(test, "pytestmark", []):
                if mark.name == "faults":
                    name, cases, places = mark.args
                    yield from ((row_name(name, case), place) for case in cases or (None,) for place in places)


def read_rows(document: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """The cells of the generated part by (fault, place)."""
    inside = document.partition(BEGIN)[2].partition(END)[0]
    lines = [line for line in inside.splitlines() if line.startswith("| ")][1:]
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]
    return {(row[0], row[1]): row for row in cells}


def render(rows: Iterable[tuple[str, ...]]) -> str:
    lines = [HEAD, *rows]
    return "\n".join(
        [
            f"| {' | '.join(lines[0])} |",
            "|---|---|---|---|---|---|",
            *(f"| {' | '.join(cells)} |" for cells in lines[1:]),
        ]
    )


def update(path: Path, found: Iterable[Row]) -> None:
    """Put what was found into the document's generated part. Rows that were not run stay, or say so; rows without a test go."""
    text = path.read_text()
    known = read_rows(text) | {row.key: row.cells() for row in found}
    rows = [known.get(key, (*key, NOT_RUN, "-", "-", "-")) for key in rows_of_tests()]
    before, _, rest = text.partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{render(rows)}\n{END}{rest.partition(END)[2]}")
