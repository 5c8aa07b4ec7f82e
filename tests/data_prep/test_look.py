"""The look before prepare refuses fields that are not there, and nothing that prepare would read."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.identity import list_corpus
from data_prep.look import HEAD_BYTES, Look, look
from data_prep.plan import Slice
from data_prep.readers import ReaderSettings, read_slice
from pipeline.config.conditions import parse
from pipeline.config.load import ConfigError
from pipeline.config.schema import RunConfig

Make = Callable[..., RunConfig]
GOOD = [{"text": f"Page {n}.", "id": n} for n in range(5)]


def seen(config: RunConfig) -> Look:
    (source,) = config.corpus.sources
    return look(source, 0, list_corpus(config)[source.name], config)


def lines(values: list[Any]) -> str:
    return "\n".join(value if isinstance(value, str) else json.dumps(value) for value in values)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(
    ("first", "quarantined"),
    [
        ({"title": "no text"}, {"missing_field": 1}),
        ({"text": "without an id"}, {}),
        ("not json", {"invalid_json": 1}),
        ([1, 2], {"missing_field": 1}),
        ('{"text": ' + "[" * 5000 + "]" * 5000 + "}", {"invalid_json": 1}),
    ],
)
def test_one_record_without_a_field_refuses_no_file(
    tmp_path: Path, run_config: Make, name: str, first: Any, quarantined: dict[str, int]
) -> None:
    values = [GOOD[0], first, *GOOD[1:]] if isinstance(first, list) else [first, *GOOD]
    (tmp_path / name).write_text(lines(values))
    found = seen(run_config(tmp_path / name, source={"id_field": "id"}))
    assert found.quarantined == quarantined
    assert {record.text for record in found.kept} >= {value["text"].encode() for value in GOOD}


def test_elements_of_an_array_are_looked_at_together(tmp_path: Path, run_config: Make) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"title": "no text"}, *GOOD], indent=1))
    assert len(seen(run_config(tmp_path / "a.json")).kept) == len(GOOD)


def test_what_is_inside_a_document_beyond_the_head_is_no_field_of_it(tmp_path: Path, run_config: Make) -> None:
    document = {"pages": [{"body": "x" * 1000} for _ in range(HEAD_BYTES // 1000)], "text": "Page 1."}
    (tmp_path / "a.json").write_text(json.dumps(document, indent=1))
    assert [record.text for record in seen(run_config(tmp_path / "a.json")).kept] == [b"Page 1."]


def test_a_field_that_no_record_has_is_refused_with_those_of_all(tmp_path: Path, run_config: Make) -> None:
    (tmp_path / "a.jsonl").write_text(lines(["broken", {"title": "x"}, {"body": {"html": "y"}}]))
    with pytest.raises(ConfigError, match=r"no field 'text' in a\.jsonl; it has title, body, body\.html$"):
        seen(run_config(tmp_path / "a.jsonl"))


def test_a_column_at_any_depth_is_a_field(tmp_path: Path, run_config: Make) -> None:
    pq.write_table(pa.table({"page": [{"main": {"text": "Page 1."}}]}), tmp_path / "a.parquet")
    assert [record.text for record in seen(run_config(tmp_path, source={"text_field": "page.main.text"})).kept] == [
        b"Page 1."
    ]
    with pytest.raises(
        ConfigError, match=r"no field 'page\.text' in a\.parquet; it has page, page\.main, page\.main\.text$"
    ):
        seen(run_config(tmp_path, source={"text_field": "page.text"}))


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        (
            "a.txt",
            {"filters": {"where": ['lang == "en"']}},
            r"filters\.where: a\.txt is text, a document without fields",
        ),
        ("a.txt", {"id_field": "id"}, r"id_field: a\.txt is text, a document without fields such as 'id'"),
        ("a.txt", {"text_field": "body"}, r"text_field: a\.txt is text"),
        ("a.warc", {"format": "warc", "text_field": "body"}, r"text_field: of a\.warc, which is WARC"),
        ("a.warc", {"format": "warc", "id_field": "uri"}, r"no field 'uri' in a\.warc; it has url, date, record_id"),
    ],
)
def test_settings_that_a_format_has_no_use_for_are_refused(
    tmp_path: Path, run_config: Make, name: str, settings: dict[str, Any], told: str
) -> None:
    (tmp_path / name).write_text("The moon rose late.")
    with pytest.raises(ConfigError, match=told):
        seen(run_config(tmp_path, source=settings))


def test_a_text_meets_no_condition(tmp_path: Path) -> None:
    settings = ReaderSettings("text", "text", None, 1000, (parse("score > 1"),))
    (record,) = read_slice(Slice("a.txt", 5, "x"), io.BytesIO(b"moons"), settings)
    assert (record.reason, record.excerpt) == ("missing_filter_field", b"no score")
