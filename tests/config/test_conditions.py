"""Conditions on fields: what they mean, by Python's own comparisons, and what is refused."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.conditions import parse
from pipeline.config.load import ConfigError, load_config


@pytest.mark.parametrize(
    ("text", "held", "not_held"),
    [
        ("score > 0.5", [0.6, 1, 10**30, Decimal("0.51")], [0.5, -1, None, float("nan")]),
        ("score != 0", [1, -0.5], [0, 0.0, None, float("nan")]),
        ('lang == "en"', ["en"], ["EN", "", None]),
        ('lang!="en"', ["de", ""], ["en", None]),
        ('date >= "2024-01-31"', ["2024-01-31", "2024-02-01 12:00:00"], ["2024-01-30", None]),
        ('meta.site in ["a", "b"]', ["a", "b"], ["c", None]),
        ("n  not   in [1, 2]", [3, 2.5], [1, 2.0, None]),
        ("clean == true", [True], [False, None]),
        ("url == null", [None], ["x", 0, False, float("nan")]),
        ("url != null", ["x", 0, float("nan")], [None]),
        ('"a field" < 3', [2], [3]),
        ('title == "a > b == \\"c\\""', ['a > b == "c"'], ["a"]),
    ],
)
def test_what_holds(text: str, held: list[Any], not_held: list[Any]) -> None:
    condition = parse(text)
    assert [condition.holds(value) for value in held] == [True] * len(held)
    assert [condition.holds(value) for value in not_held] == [False] * len(not_held)
    assert parse(condition.name) == condition


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    st.text(min_size=1, max_size=8),
    st.sampled_from(["==", "!=", "<", "<=", ">", ">="]),
    st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
)
def test_a_name_reads_back(field: str, operator: str, value: Any) -> None:
    condition = parse(f"{json.dumps(field)} {operator} {json.dumps(value)}")
    assert (condition.field, condition.operator, condition.value) == (field, operator, value)
    assert parse(condition.name) == condition


@pytest.mark.parametrize(
    ("text", "value"),
    [("score > 0.5", "0.7"), ("score > 0.5", True), ('lang == "en"', 5), ("clean == true", 1), ("x == 1", [1])],
)
def test_another_kind_is_a_mistake(text: str, value: Any) -> None:
    with pytest.raises(TypeError, match=r"which is no (number|text|boolean)"):
        parse(text).holds(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("score", "is no condition"),
        ("score =< 1", "is no condition"),
        ("", "is no condition"),
        ("lang == en", "is no JSON value; text stands in double quotes"),
        ("score > NaN", "is no JSON value"),
        ("lang in []", "takes a list"),
        ('lang in "en"', "takes a list"),
        ('lang in ["a", 1]', "takes a list"),
        ("lang == [1]", "does not compare"),
        ("url > null", "does not compare"),
        ("clean < true", "does not compare"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)
    with pytest.raises(ConfigError, match=rf"corpus\.sources\.0\.filters\.where.*{message}"):
        load_config("debug", [f"corpus.sources.0.filters.where={json.dumps([text])}"])


def test_the_schema_writes_them_in_one_way() -> None:
    config = load_config("debug", ["corpus.sources.0.filters.where=['lang==\"en\"', 'score  >  1.50']"])
    assert config.corpus.sources[0].filters.where == ('lang == "en"', "score > 1.5")
