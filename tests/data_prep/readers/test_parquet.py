"""Parquet: every type and every bad row, by row group, in bounded memory."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.readers import ReaderSettings, compression, row_group_bytes
from data_prep.readers import parquet as reader
from tests.data_prep.readers.common import SETTINGS, outcome, parquet, read


def test_parquet_by_row_group() -> None:
    texts = ["one", None, "three", "", "x" * 2000, "six", "seven"]
    table = pa.table({"text": texts, "id": [1, 2, 3, 4, 5, None, 7], "other": [0.0] * 7})
    data = parquet(table, row_group_size=3)
    expected = [
        ("a.parquet#0", "one"),
        ("a.parquet#1", "!null_field"),
        ("a.parquet#2", "three"),
        ("a.parquet#3", "!empty_document"),
        ("a.parquet#4", "!too_large"),
        ("a.parquet#5", "six"),
        ("a.parquet#6", "seven"),
    ]
    assert outcome(read("a.parquet", data)) == expected
    assert outcome(read("a.parquet", data, SETTINGS, 1, 3)) == expected[3:]
    assert [record.doc_id for record in read("a.parquet", data)][5:] == ["a.parquet#5", "7"]
    sizes = row_group_bytes(io.BytesIO(data))
    assert sizes is not None
    assert len(sizes) == 3


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_text_types(kind: pa.DataType) -> None:
    data = parquet(pa.table({"text": pa.array(["ä", "b"]).cast(kind)}))
    assert [text for _, text in outcome(read("a.parquet", data))] == ["ä", "b"]


def test_parquet_pages_that_do_not_fit_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value larger than PAGE_BYTES costs its row group, by name; large column chunks of small pages are streamed."""
    texts = [f"{row} " + "word " * 100 for row in range(400)]
    pages = {"row_group_size": 100, "data_page_size": 4000, "write_batch_size": 5, "use_dictionary": False}
    whole = parquet(pa.table({"text": texts, "id": range(400)}), **pages)
    large = [*texts[:150], "x" * 30_000, *texts[150:]]
    data = parquet(pa.table({"text": large}), **pages)
    settings = ReaderSettings("auto", "text", None, 10_000)
    assert [record.reason for record in read("a.parquet", data, settings) if record.reason] == ["too_large"]
    monkeypatch.setattr(reader, "PAGE_BYTES", 20_000)
    monkeypatch.setattr(reader, "BATCH_BYTES", 10_000)
    monkeypatch.setattr(reader, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(compression, "READ_BYTES", 500)
    assert outcome(read("a.parquet", whole, settings)) == [(f"a.parquet#{row}", text) for row, text in enumerate(texts)]
    records = read("a.parquet", data, settings)
    (bad,) = [record for record in records if record.reason]
    assert (bad.location, bad.reason) == ("a.parquet#100", "page_too_large")
    assert b"column text has a page of 32," in bad.excerpt
    assert [record.text.decode() for record in records if not record.reason] == large[:100] + large[200:]


def test_parquet_bad_columns() -> None:
    assert [text for _, text in outcome(read("a.parquet", parquet(pa.table({"body": ["a", "b"]}))))] == [
        "!missing_field"
    ] * 2
    numbers = parquet(pa.table({"text": pa.array([1, None])}))
    assert [text for _, text in outcome(read("a.parquet", numbers))] == ["!non_string_field", "!null_field"]
    invalid = pa.array([b"ok", b"\xff\xfe", b"fine"], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 3, invalid.buffers())
    data = parquet(pa.table({"text": strings}))
    assert [text for _, text in outcome(read("a.parquet", data))] == ["ok", "!invalid_utf8", "fine"]


def test_truncated_parquet() -> None:
    data = parquet(pa.table({"text": [f"document {index}" for index in range(100)]}), row_group_size=10)
    for size in (0, 3, 100, len(data) // 2, len(data) - 1):
        assert [record.reason for record in read("a.parquet", data[:size])] == ["corrupt_file"]
        assert row_group_bytes(io.BytesIO(data[:size])) is None


def test_a_damaged_parquet_page_costs_its_row_group() -> None:
    table = pa.table({"text": [f"document {index} " * 20 for index in range(100)]})
    data = bytearray(
        parquet(table, row_group_size=10, compression="zstd", write_page_checksum=True, use_dictionary=False)
    )
    column = pq.ParquetFile(io.BytesIO(bytes(data))).metadata.row_group(5).column(0)
    data[column.data_page_offset + column.total_compressed_size - 10] ^= 1
    records = read("a.parquet", bytes(data))
    assert [record.reason for record in records if record.reason] == ["corrupt_file"]
    assert outcome(records)[50] == ("a.parquet#50", "!corrupt_file")
    texts = table["text"].to_pylist()
    assert [record.text.decode() for record in records if not record.reason] == texts[:50] + texts[60:]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_huge_parquet_value_needs_little_memory(tmp_path: Path) -> None:
    """600 MB in one value, in a file of 60 kB."""
    path = tmp_path / "a.parquet"
    schema = pa.schema([("text", pa.large_string())])
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False, write_statistics=False) as writer:
        for text in ("first", "x" * (600 << 20), "last"):
            writer.write_table(pa.table({"text": pa.array([text], pa.large_string())}, schema=schema))
    program = (
        "import sys\nfrom data_prep.plan import Slice\nfrom data_prep.readers import *\n"
        "path = sys.argv[1]\n"
        "found = read_slice(Slice('a.parquet', 1, ''), open(path, 'rb'), ReaderSettings('auto', 'text', None, 64 << 20))\n"
        "found = [r.reason or r.text.decode() for r in found]\n"
        "assert found == ['first', 'page_too_large', 'last'], found\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, check=True, cwd=Path(__file__).parents[3]
    )
    assert int(done.stdout) * 1024 < 300 << 20


def test_a_dictionary_that_every_row_repeats_is_read_in_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 rows of 9 kB are 2 MB in memory, but 9 kB in the file."""
    data = parquet(pa.table({"text": ["y" * 9000] * 200}))
    monkeypatch.setattr(reader, "BATCH_BYTES", 20_000)
    seen = []
    rows = reader.records

    def counted(path: str, row: int, batch: pa.RecordBatch, *others: object) -> object:
        seen.append(batch.num_rows)
        return rows(path, row, batch, *others)

    monkeypatch.setattr(reader, "records", counted)
    assert len(read("a.parquet", data, ReaderSettings("auto", "text", None, 10_000))) == 200
    assert max(seen) == 2
    monkeypatch.setattr(reader, "PAGE_BYTES", 8_000)
    (record,) = read("a.parquet", data)
    assert record.reason == "page_too_large"


TEXTS = ["one", "zwei äöü", None, "x" * 500]
BYTES = [None if text is None else text.encode() for text in TEXTS]
TEXT_COLUMNS = {
    "string": pa.array(TEXTS),
    "large_string": pa.array(TEXTS, pa.large_string()),
    "string_view": pa.array(TEXTS, pa.string_view()),
    "binary": pa.array(BYTES),
    "large_binary": pa.array(BYTES, pa.large_binary()),
    "binary_view": pa.array(BYTES, pa.binary_view()),
    "dictionary of string": pa.array(TEXTS).dictionary_encode(),
    "dictionary of large_string": pa.array(TEXTS, pa.large_string()).dictionary_encode(),
    "dictionary of binary": pa.array(BYTES).dictionary_encode(),
    "arrow.json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(TEXTS)),
    "arrow.opaque": pa.ExtensionArray.from_storage(pa.opaque(pa.string(), "type", "vendor"), pa.array(TEXTS)),
}
OTHER_COLUMNS = {
    "null": pa.nulls(2),
    "bool": pa.array([True, None]),
    "uint64": pa.array([2**64 - 1, None], pa.uint64()),
    "half float": pa.array([1.5, None], pa.float16()),
    "double": pa.array([1.5, None]),
    "decimal": pa.array([1, None], pa.decimal128(38, 2)),
    "decimal256": pa.array([1, None], pa.decimal256(76, 2)),
    "date": pa.array([1, None], pa.date32()),
    "time": pa.array([1, None], pa.time64("ns")),
    "timestamp": pa.array([1, None], pa.timestamp("ns", "UTC")),
    "duration": pa.array([1, None], pa.duration("ns")),
    "list of string": pa.array([["a"], None]),
    "list of views": pa.array([["a"], None], pa.list_(pa.string_view())),
    "fixed size list": pa.array([["a", "b"], None], pa.list_(pa.string(), 2)),
    "map": pa.array([[("a", "b")], None], pa.map_(pa.string(), pa.string())),
    "struct": pa.array([{"text": "a"}, None]),
    "bool8": pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, None], pa.int8())),
    "tensor": pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.int32(), [1]), pa.array([[1], None], pa.list_(pa.int32(), 1))
    ),
}


@pytest.mark.parametrize("name", TEXT_COLUMNS)
def test_what_arrow_casts_to_binary_is_text(name: str) -> None:
    data = parquet(pa.table({"text": TEXT_COLUMNS[name]}))
    assert [text for _, text in outcome(read("a.parquet", data))] == ["one", "zwei äöü", "!null_field", "x" * 500]


def test_text_of_fixed_size() -> None:
    data = parquet(pa.table({"text": pa.array([b"ab", b"cd", None], pa.binary(2))}))
    assert [text for _, text in outcome(read("a.parquet", data))] == ["ab", "cd", "!null_field"]


@pytest.mark.parametrize("name", OTHER_COLUMNS)
def test_anything_else_is_told_from_null(name: str) -> None:
    first, second = read("a.parquet", parquet(pa.table({"text": OTHER_COLUMNS[name], "id": [7, 8]})))
    assert (first.reason, second.reason) == ("null_field" if name == "null" else "non_string_field", "null_field")
    assert first.excerpt.startswith(b"text is ")
    assert second.excerpt == b"text is null (id 8)"


def test_an_excerpt_of_every_bad_row() -> None:
    (missing,) = read("a.parquet", parquet(pa.table({"body": ["a"], "url": ["b"]})))
    assert missing.excerpt == b"the columns are body, url"
    (empty,) = read("a.parquet", parquet(pa.table({"text": [""], "id": ["x"]})))
    assert (empty.reason, empty.excerpt) == ("empty_document", b"text is empty (id x)")


def test_nested_columns() -> None:
    meta = pa.array([{"text": "one", "id": 1, "n": {"text": "deep"}}, None, {"text": None, "id": 3, "n": None}])
    nested = ReaderSettings("auto", "meta.text", "meta.id", 1000)
    for file in (pa.table({"meta": meta}), pa.table({"meta": meta.cast(meta.type), "meta.other": ["a"] * 3})):
        records = read("a.parquet", parquet(file), nested)
        assert [record.reason or record.text.decode() for record in records] == ["one", "null_field", "null_field"]
        assert records[0].doc_id == "1"
    deep = read("a.parquet", parquet(pa.table({"meta": meta})), ReaderSettings("auto", "meta.n.text", None, 1000))
    assert [record.reason or record.text.decode() for record in deep] == ["deep", "null_field", "null_field"]
    exact = pa.table({"meta": meta, "meta.text": ["a", "b", "c"]})
    assert [text for _, text in outcome(read("a.parquet", parquet(exact), nested))] == ["a", "b", "c"]
    absent = read("a.parquet", parquet(pa.table({"meta": meta})), ReaderSettings("auto", "meta.body", None, 1000))
    assert {record.reason for record in absent} == {"missing_field"}
    view = pa.table({"meta": pa.array([{"text": "v"}], pa.struct([("text", pa.string_view())]))})
    assert [text for _, text in outcome(read("a.parquet", parquet(view), nested))] == ["v"]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array([2**64 - 1, 2**64 - 2], pa.uint64()), ["18446744073709551615", "18446744073709551614"]),
        (pa.array(["a", None], pa.string_view()), ["a", "a.parquet#1"]),
        (pa.array([b"\xff", b"ab"]), ["\\xff", "ab"]),
        (
            pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16, None], pa.binary(16))),
            ["30" * 16, "a.parquet#1"],
        ),
        (pa.array([1, 2], pa.timestamp("ns")), ["1970-01-01 00:00:00.000000001", "1970-01-01 00:00:00.000000002"]),
        (pa.array([{"a": 1}, {"a": 2}]), ['{"a": 1}', '{"a": 2}']),
        (pa.array(["x", "y"]).dictionary_encode(), ["x", "y"]),
        (pa.array([10**37 + 1, 10**37 + 2], pa.decimal128(38, 0)), [str(10**37 + 1), str(10**37 + 2)]),
    ],
    ids=str,
)
def test_ids_of_any_type_stay_apart(ids: pa.Array, expected: list[str]) -> None:
    records = read("a.parquet", parquet(pa.table({"text": ["one", "two"], "id": ids})))
    assert [record.doc_id for record in records] == expected
