"""Each row of docs/kubernetes-facts.md names tests that exist."""

from __future__ import annotations

import re

import pytest

from tests.k8s.manifests import REPOSITORY
from tests.k8s.mutations import MUTATIONS
from tests.k8s.test_mutations import GITOPS

ROWS = re.findall(r"^\| (\d+) \|.*\| ([^|]*) \|$", (REPOSITORY / "docs/kubernetes-facts.md").read_text(), re.M)
TESTS = "".join(
    path.read_text() for folder in ("tests/k8s", "tests/workflow") for path in (REPOSITORY / folder).glob("test_*.py")
)


def test_there_are_twenty() -> None:
    assert [int(number) for number, _ in ROWS] == list(range(1, 21))


@pytest.mark.parametrize(("number", "held_by"), ROWS)
def test_the_tests_of_a_row_exist(number: str, held_by: str) -> None:
    names = re.findall(r"`([^`]+)`", held_by)
    assert names
    for name in names:
        assert name in MUTATIONS or name in GITOPS or f"def {name}(" in TESTS, f"row {number}: {name}"
