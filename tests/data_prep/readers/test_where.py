"""Conditions on other fields: the same verdict whatever the format."""

from __future__ import annotations

import csv
import datetime
import io
import json
from typing import Any

import pyarrow as pa
import pytest

from data_prep.plan import Slice
from data_prep.readers import ReaderSettings, read_slice
from pipeline.config.conditions import parse
from pipeline.config.schema import FilterConfig, SourceConfig
from tests.data_prep.readers.common import parquet
from tests.data_prep.readers.test_arrow_ipc import stream

DOCUMENTS: list[dict[str, Any]] = [
    {"text": "one", "score": 0.75, "lang": "en", "meta": {"n": 1}},
    {"text": "two", "score": 0.25, "lang": "en", "meta": {"n": 2}},
    {"text": "three", "score": None, "lang": "en", "meta": {"n": None}},
    {"text": "four", "score": 0.9, "lang": "de", "meta": {"n": 4}},
    {"text": "five", "score": 0.9, "lang": None, "meta": {"n": 5}},
    {"text": "", "score": 0.9, "lang": "en", "meta": {"n": 6}},
]
FLAT = [{name: value for name, value in document.items() if name != "meta"} for document in DOCUMENTS]


def as_csv(documents: list[dict[str, Any]]) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(documents[0]))
    writer.writeheader()
    writer.writerows(documents)
    return buffer.getvalue().encode()


FORMATS = {
    "a.jsonl": lambda documents: b"\n".join(json.dumps(document).encode() for document in documents),
    "a.json": lambda documents: json.dumps(documents).encode(),
    "a.parquet": lambda documents: parquet(pa.Table.from_pylist(documents)),
    "a.arrow": lambda documents: stream(pa.Table.from_pylist(documents)),
}


def verdicts(name: str, data: bytes, *where: str) -> list[str]:
    settings = ReaderSettings("auto", "text", None, 1000, tuple(map(parse, where)))
    records = read_slice(Slice(name, len(data), ""), io.BytesIO(data), settings)
    return [record.reason or record.rejected or record.text.decode() for record in records]


@pytest.mark.parametrize("name", [*FORMATS, "a.csv"])
def test_conditions(name: str) -> None:
    data = as_csv(FLAT) if name == "a.csv" else FORMATS[name](DOCUMENTS)
    score, lang = "score > 0.5", 'lang == "en"'
    assert verdicts(name, data, score, lang) == ["one", score, score, lang, lang, "empty_document"]
    assert verdicts(name, data, "score == null") == [
        *["score == null"] * 2,
        "three",
        *["score == null"] * 2,
        "empty_document",
    ]
    missing = verdicts(name, data, "scroe > 0.5")
    assert missing == ["missing_filter_field"] * 5 + ["empty_document"]
    wrong = verdicts(name, data, "lang > 0.5")
    assert wrong == ["filter_type_mismatch"] * 4 + ["lang > 0.5", "empty_document"]


@pytest.mark.parametrize("name", FORMATS)
def test_nested_fields(name: str) -> None:
    condition = "meta.n in [1, 4]"
    found = verdicts(name, FORMATS[name](DOCUMENTS), condition)
    assert found == ["one", condition, condition, "four", condition, "empty_document"]


def test_columns_of_other_types() -> None:
    table = pa.table(
        {
            "text": ["a", "b"],
            "date": [datetime.date(2024, 1, 31), datetime.date(2023, 1, 1)],
            "time": pa.array([1_706_700_000_000_000_001, 0], pa.timestamp("ns")),
            "kind": pa.array(["x", "y"]).dictionary_encode(),
            "view": pa.array(["x", "y"], pa.string_view()),
            "decimal": pa.array([2, 1], pa.decimal128(10, 2)),
            "small": pa.array([2.0, float("nan")], pa.float16()),
            "flag": [True, False],
        }
    )
    for condition in (
        'date >= "2024-01-01"',
        'time > "2024"',
        'kind == "x"',
        'view == "x"',
        "decimal > 1.5",
        "small > 0",
        "small != 5",
        "flag == true",
    ):
        assert verdicts("a.parquet", parquet(table), condition) == ["a", condition]


def test_the_settings_of_a_source() -> None:
    source = SourceConfig(name="a", path="/a", text_field="t", filters=FilterConfig(where=("score>1",)))
    assert ReaderSettings.of(source, 5) == ReaderSettings("auto", "t", None, 5, (parse("score > 1"),))
