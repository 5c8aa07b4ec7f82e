"""Filters, by hand-counted documents and against plain Python."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.filters import alphanumeric_fraction, rejected_by, repeated_line_fraction
from pipeline.config.schema import FilterConfig


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.text(min_size=1, max_size=100))
def test_alphanumeric_fraction(text: str) -> None:
    assert alphanumeric_fraction(text.encode()) == pytest.approx(sum(map(str.isalnum, text)) / len(text))


def test_repeated_lines() -> None:
    assert repeated_line_fraction(b"a\nb\n  a  \n\n\na") == 0.5  # a, b, a, a: two copies of four lines
    assert repeated_line_fraction(b"a\nb\nc") == 0.0
    assert repeated_line_fraction(b"\n \n") == 0.0


@pytest.mark.parametrize(
    ("text", "settings", "rejection"),
    [
        ("äöü", {"min_characters": 4}, "min_characters"),
        ("äöü", {"min_characters": 3, "max_characters": 3}, None),
        ("äöüß", {"max_characters": 3}, "max_characters"),
        ("x\nx\ny\nz", {"max_repeated_line_fraction": 0.25}, None),
        ("x\nx\nx\nz", {"max_repeated_line_fraction": 0.25}, "max_repeated_line_fraction"),
        ("ab!!", {"min_alphanumeric_fraction": 0.5}, None),
        ("ab!!!", {"min_alphanumeric_fraction": 0.5}, "min_alphanumeric_fraction"),
        ("漢字。。。", {"min_alphanumeric_fraction": 0.5}, "min_alphanumeric_fraction"),
        ("anything at all", {}, None),
    ],
)
def test_rejections(text: str, settings: dict[str, float], rejection: str | None) -> None:
    assert rejected_by(text.encode(), FilterConfig(**settings)) == rejection
