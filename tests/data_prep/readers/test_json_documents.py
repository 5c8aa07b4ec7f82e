"""JSON arrays and documents over several lines: what json.load finds, streamed, with every bad element named."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.readers import ReaderSettings, compression, is_json_lines
from tests.data_prep.readers.common import outcome, read

TRICKY = [
    {"text": "plain", "id": 1},
    {"text": 'quotes " and \\ and \\" and brackets ]}[{,', "id": "b"},
    {"text": "ünïcode 漢字 😀", "nested": {"a": [1, {"b": "]"}], "c": {}}},
    {"text": "", "id": 3},
    {"text": None},
    {"body": "wrong"},
    {"text": 5},
    17,
    "text",
    None,
    [],
    [{"text": "not a document"}],
    {"text": "last"},
]


def expected(values: list[Any]) -> list[str]:
    found = []
    for value in values:
        text = value.get("text", 0) if isinstance(value, dict) else 0
        absent = not isinstance(value, dict) or "text" not in value
        reason = (
            "missing_field"
            if absent
            else "null_field"
            if text is None
            else "non_string_field"
            if not isinstance(text, str)
            else "empty_document"
        )
        found.append(text if isinstance(text, str) and text else f"!{reason}")
    return found


@pytest.mark.parametrize("dump", [{}, {"indent": 1}, {"separators": (",", ":"), "ensure_ascii": False}], ids=str)
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_an_array(dump: dict[str, Any], compress: Any) -> None:
    data = json.dumps(TRICKY, **dump).encode()
    records = read("a.json", compress(data))  # what the name does not say the first bytes tell
    assert [text for _, text in outcome(records)] == expected(TRICKY)
    for record in records:
        offset = int(record.location.removeprefix("a.json@"))
        assert json.JSONDecoder().raw_decode(data[offset:].decode())[0] in TRICKY
    assert [records[0].doc_id, records[1].doc_id] == ["1", "b"]


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.integers(),
            st.text(max_size=5),
            st.dictionaries(
                st.sampled_from(["text", "a", 'q"[', "\\"]),
                st.recursive(
                    st.one_of(st.none(), st.text(), st.floats(allow_nan=False, allow_infinity=False)),
                    st.lists,
                    max_leaves=5,
                ),
                max_size=4,
            ),
        ),
        max_size=8,
    ),
    st.sampled_from([None, 0, 3]),
    st.booleans(),
    st.integers(1, 40),
)
def test_any_array_in_chunks_of_any_size(values: list[Any], indent: int | None, ascii_only: bool, chunk: int) -> None:
    data = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode()
    before = compression.READ_BYTES
    compression.READ_BYTES = chunk
    try:
        records = read("a.json", data, ReaderSettings("auto", "text", None, 10_000))
    finally:
        compression.READ_BYTES = before
    assert [text for _, text in outcome(records)] == expected(values)


def test_documents_over_several_lines() -> None:
    values = [value for value in TRICKY if isinstance(value, dict)]
    data = "\n".join(json.dumps(value, indent=2) for value in values).encode() + b"\n"
    assert [text for _, text in outcome(read("a.json", data))] == expected(values)
    (single,) = read("a.json", json.dumps({"text": "one file, one document"}, indent=4).encode())
    assert single.text == b"one file, one document"


def test_damage_costs_its_element() -> None:
    elements = [b'{"text": "a"}', b'{"text": nope}', b'{"text": "\xff"}', b'{"text": "\\ud800"}', b'{"text": "b"}']
    large = b'{"text": "' + b"x" * 2000 + b'"}'
    data = b"[" + b",\n".join([*elements, large, b'{"text": "c"}']) + b"]\n"
    records = read("a.json", data)
    assert [text for _, text in outcome(records)] == [
        *("a", "!invalid_json", "!invalid_utf8", "!lone_surrogates", "b", "!too_large", "c")
    ]
    assert records[5].excerpt == large[:199].join([b"\n", b""])
    assert records[1].location == f"a.json@{data.index(elements[1])}"


@pytest.mark.parametrize(
    "cut", [b'[{"text": "a"}, {"text": "b', b'[{"text": "a"}', b'[{"text": "a"},', b'[{"text": "a"}, {']
)
def test_an_array_that_does_not_end(cut: bytes) -> None:
    texts = [text for _, text in outcome(read("a.json", cut))]
    assert texts[-1] == "!corrupt_file"
    assert texts[:-1] in ([], ["a"])
    if b"}," in cut:
        assert texts[0] == "a"


def test_an_empty_array_holds_nothing() -> None:
    assert read("a.json", b"[]") == read("a.json", b" [ \n ] \n") == []


@pytest.mark.parametrize(
    ("head", "lines"),
    [
        (b'{"text": "a"}\n{"text": "b"}\n', True),
        (b'{"text": "a"}', True),
        (b'{"text": "broken\n{"text": "b"}', True),
        (b'{"text": "a",\n{"text": "b"}', True),
        (b'["a"]\n["b"]\n', True),
        (b'[{"text": "a"},\n{"text": "b"}]', False),
        (b'[{"text": "a"}]\n', False),
        (b'\xef\xbb\xbf[\n{"text": "a"}]', False),
        (b'{\n  "text": "a"\n}\n{\n  "text": "b"\n}', False),
        (b'{"data": [\n  {"text": "a"}', False),
        (gzip.compress(b'{"text": "a"}\n', mtime=0), False),
    ],
)
def test_lines_are_told_from_documents(head: bytes, lines: bool) -> None:
    assert is_json_lines("a.jsonl", io.BytesIO(head)) is lines


def test_a_named_format_is_not_second_guessed() -> None:
    forced = ReaderSettings("jsonl", "text", "id", 1000)
    assert [text for _, text in outcome(read("a", b'[{"text": "a"}]\n', forced))] == ["!missing_field"]


def test_a_byte_order_mark() -> None:
    for data in (b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n', b'\xef\xbb\xbf[{"text": "a"}, {"text": "b"}]'):
        assert [text for _, text in outcome(read("a.json", data))] == ["a", "b"]


@pytest.mark.parametrize("form", ["{}\n", "[{}]"])
def test_ids_beyond_64_bits_stay_apart(form: str) -> None:
    numbers = [2**63, 2**64 - 1, 2**64, 2**64 + 1, -(2**63) - 1, -(2**63) - 2, 10**40, 10**40 + 1]
    for number in numbers:
        (record,) = read("a.json", form.format(f'{{"text": "a", "id": {number}}}').encode())
        assert record.doc_id == str(number)
    for written in ("0.1000000000000000055", "0.1", "true"):
        (record,) = read("a.json", form.format(f'{{"text": "a", "id": {written}}}').encode())
        assert record.doc_id == written
    (record,) = read("a.json", form.format('{"text": "a", "id": {"n": 18446744073709551617}}').encode())
    assert record.doc_id == '{"n":18446744073709551617}'


def test_nested_fields() -> None:
    nested = ReaderSettings("auto", "meta.text", "meta.id", 1000)
    lines = b'{"meta": {"text": "a", "id": 7}}\n{"meta": null}\n{"meta": {"text": null}}\n{"meta.text": "exact"}\n{"meta": {}}\n'
    records = read("a.jsonl", lines, nested)
    assert [text for _, text in outcome(records)] == ["a", "!missing_field", "!null_field", "exact", "!missing_field"]
    assert records[0].doc_id == "7"
