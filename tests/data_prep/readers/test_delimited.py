"""CSV and TSV; oracles: Python's csv module, pyarrow and pandas."""

from __future__ import annotations

import csv
import gzip
import io

import pandas
import pyarrow.csv as pyarrow_csv
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.readers import ReaderSettings, compression
from data_prep.readers.delimited import _Rows
from tests.data_prep.readers.common import outcome, read

CELLS = st.text(st.sampled_from("ab\",;\t\n'ü漢 "), max_size=12)


def written(rows: list[tuple[str, ...]], header: tuple[str, ...] = ("id", "text", "more"), **options: object) -> bytes:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, **options).writerows([header, *rows])
    return buffer.getvalue().encode()


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=12),
    st.sampled_from(["csv", "tsv"]),
    st.sampled_from(["\r\n", "\n"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.integers(1, 50),
)
def test_rows_are_those_that_were_written(
    rows: list[tuple[str, ...]], kind: str, newline: str, quoting: int, chunk: int
) -> None:
    delimiter = "," if kind == "csv" else "\t"
    data = written(rows, delimiter=delimiter, lineterminator=newline, quoting=quoting)
    before = compression.READ_BYTES
    compression.READ_BYTES = chunk
    try:
        records = read(f"a.{kind}", data)
    finally:
        compression.READ_BYTES = before
    assert [record.reason or record.text.decode() for record in records] == [
        text or "empty_document" for _, text, _ in rows
    ]
    for record, (doc_id, text, _) in zip(records, rows):
        assert not text or record.doc_id == (doc_id or record.location)
        offset = int(record.location.partition("@")[2])
        (row,) = list(csv.reader(io.StringIO(data[offset:].decode(), newline=""), delimiter=delimiter))[:1]
        assert row[1] == text
    if rows and quoting == csv.QUOTE_ALL:  # a bare "" among these means null to them
        options = pyarrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
        strings = pyarrow_csv.ConvertOptions(column_types={"text": "string"}, strings_can_be_null=False)
        theirs = pyarrow_csv.read_csv(io.BytesIO(data), parse_options=options, convert_options=strings)
        assert theirs["text"].to_pylist() == [text for _, text, _ in rows]
        frame = pandas.read_csv(io.BytesIO(data), sep=delimiter, keep_default_na=False, dtype=str)
        assert frame["text"].tolist() == [text for _, text, _ in rows]


def test_bad_rows_are_named() -> None:
    data = (
        b"\xef\xbb\xbftext,id\r\n"
        b"fine,1\n"
        b"too,many,fields\n"
        b"too few\n"
        b"\n"
        b'"wrong" quotes,2\n'
        b'"two\nlines, one ""row""",3\n'
        b"caf\xe9,4\n"
        b",5\n" + b"x" * 1500 + b",6\n"
        b'"' + b"many lines\n" * 300 + b'",7\n'
        b"after,8\n"
        b'"never closed,9\n'
        b"swallowed,10\n"
        b'"closes here",11\n'
        b"last,12"
    )
    records = read("a.csv", data)
    assert [text for _, text in outcome(records)] == [
        "fine",
        "!invalid_csv",
        "!invalid_csv",
        "!invalid_csv",
        'two\nlines, one "row"',
        "!invalid_utf8",
        "!empty_document",
        "!too_large",
        "!too_large",
        "after",
        "!invalid_csv",
        "last",
    ]
    assert records[1].excerpt == b"3 fields where the header has 2: too,many,fields"
    assert records[10].location == f"a.csv@{data.index(b'never') - 1}"
    assert [records[0].doc_id, records[4].doc_id, records[-1].doc_id] == ["1", "3", "12"]


def test_a_quote_that_nothing_closes() -> None:
    assert [text for _, text in outcome(read("a.csv", b'text\na\n"b\nc\n'))] == ["a", "!invalid_csv"]
    long = b'text\na\n"' + b"line\n" * 1000
    assert [text for _, text in outcome(read("a.csv", long))] == ["a", "!too_large"]


def test_headers() -> None:
    (record,) = read("a.csv", b"body;text\nx;y\n")
    assert (record.reason, record.excerpt) == ("missing_field", b"the columns are body;text")
    assert read("a.csv", b"") == read("a.csv", b"text,id\n") == []
    (record,) = read("a.tsv.gz", gzip.compress(b"n\tbody\n1\tx, y\n"), ReaderSettings("auto", "body", "n", 100))
    assert (record.text, record.doc_id) == (b"x, y", "1")


def test_fields_longer_than_the_modules_limit() -> None:
    (record,) = read("a.csv", b"text\n" + b"y" * 300_000, ReaderSettings("auto", "text", None, 400_000))
    assert len(record.text) == 300_000


@pytest.mark.parametrize("size", [10, 60, 100])
def test_a_damaged_stream(size: int) -> None:
    whole = gzip.compress(b"text\n" + b"".join(b"document %d\n" % number for number in range(200)))
    records = read("a.csv.gz", whole[:size])
    assert records[-1].reason == "corrupt_file"


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.text(st.sampled_from('ab",\n'), max_size=25), st.integers(1, 9))
def test_whatever_the_csv_module_reads_is_read_so(text: str, chunk: int) -> None:
    try:
        expected = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except csv.Error:
        return
    before = compression.READ_BYTES
    compression.READ_BYTES = chunk
    try:
        found = list(_Rows(b",", 1000).of(io.BytesIO(text.encode())))
    finally:
        compression.READ_BYTES = before
    assert [[field.decode() for field in fields] for _, fields, problem, _ in found if not problem] == expected
