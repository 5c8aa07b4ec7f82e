"""The document's rows are the tests' rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.faults.table import BEGIN, DOCUMENT, END, NOT_RUN, Row, read_rows, rows_of_tests, update


def test_every_row_of_the_document_is_a_test_and_every_test_a_row() -> None:
    tests = list(rows_of_tests())
    assert [row for row, count in Counter(tests).items() if count > 1] == []
    rows = read_rows(DOCUMENT.read_text())
    assert list(rows) == tests
    assert [cells for cells in rows.values() if len(cells) != 6 or not all(cells)] == []


def test_what_was_found_replaces_its_row_alone(tmp_path: Path) -> None:
    first, second = list(rows_of_tests())[:2]
    document = tmp_path / "document.md"
    document.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    update(document, [Row(*second, "old", "yes"), Row("no such fault", "folder", "x", "yes")])
    update(document, [Row(*first, "done", "yes", 3, 7.6)])
    rows = read_rows(document.read_text())
    assert list(rows) == list(rows_of_tests())
    assert rows[first] == (*first, "done", "yes", "3", "8")
    assert rows[second] == (*second, "old", "yes", "-", "-")
    assert {cells[2] for key, cells in rows.items() if key not in (first, second)} == {NOT_RUN}
    update(document, [Row(*second, "new", "yes")])
    assert read_rows(document.read_text())[second][2] == "new"
    assert document.read_text().startswith("before\n")
    assert document.read_text().endswith("after\n")
