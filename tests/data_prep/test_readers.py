"""Readers: every document of every format, and every bad record named with its place."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import readers
from data_prep.plan import Slice
from data_prep.readers import ReaderSettings, Record, read_slice, row_group_bytes

SETTINGS = ReaderSettings("auto", "text", "id", 1000)


def read(
    name: str, data: bytes, settings: ReaderSettings = SETTINGS, start: int = 0, stop: int | None = None
) -> list[Record]:
    return list(read_slice(Slice(name, len(data), "", start, stop), io.BytesIO(data), settings))


def outcome(records: list[Record]) -> list[tuple[str, str]]:
    """(location, text or !reason)"""
    return [(record.location, f"!{record.reason}" if record.reason else record.text.decode()) for record in records]


def parquet(table: pa.Table, **options: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


JSON_LINES = [
    (b'{"text": "plain", "id": "doc-1"}', "plain"),
    ('{"text": "ünïcode 漢字 \\ud83d\\ude00"}'.encode(), "ünïcode 漢字 😀"),
    (b'{"text": "not closed', "!invalid_json"),
    (b'{"text": NaN}', "!invalid_json"),
    (b'{"text": "\xff\xfe"}', "!invalid_utf8"),
    (b'{"text": "\\ud800 alone"}', "!lone_surrogates"),
    (b'{"body": "wrong name"}', "!missing_field"),
    (b'{"text": null}', "!missing_field"),
    (b'["text"]', "!missing_field"),
    (b'{"text": 17}', "!non_string_field"),
    (b'{"text": ["a"]}', "!non_string_field"),
    (b'{"text": ""}', "!empty_document"),
    (b'{"text": "' + b"x" * 1000 + b'"}', "!too_large"),
    (b'{"text": "last\\nline", "id": 5}', "last\nline"),
]


def located(name: str) -> tuple[bytes, list[tuple[str, str]]]:
    data, expected = b"", []
    for line, result in JSON_LINES:
        expected.append((f"{name}@{len(data)}", result))
        data += line + b"\n"
    return data, expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.zst"])
def test_json_lines(name: str) -> None:
    data, expected = located(name)
    compress = {"z": gzip.compress, "t": zstandard.ZstdCompressor().compress, "l": bytes}[name[-1]]
    records = read(name, compress(data))
    assert outcome(records) == expected
    assert [records[0].doc_id, records[-1].doc_id, records[1].doc_id] == ["doc-1", "5", records[1].location]
    assert outcome(read(name, compress(data.rstrip(b"\n")))) == expected  # without a newline at the end
    blank = b"\n  \n" + data.replace(b"\n", b"\r\n")
    assert [text for _, text in outcome(read(name, compress(blank)))] == [text for _, text in expected]


@pytest.mark.parametrize(
    ("name", "compress"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.ZstdCompressor().compress)]
)
def test_several_frames_are_one_file(name: str, compress: object) -> None:
    data, expected = located(name)
    assert outcome(read(name, compress(data[:300]) + compress(data[300:]))) == expected


@pytest.mark.parametrize(
    ("name", "compress"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.ZstdCompressor().compress)]
)
def test_a_damaged_file_is_one_record_and_the_rest_survives(
    name: str, compress: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    import random

    monkeypatch.setattr(readers, "READ_BYTES", 1000)
    rng = random.Random(0)
    lines = [json.dumps({"text": str(rng.getrandbits(800))}).encode() + b"\n" for _ in range(3000)]
    whole = compress(b"".join(lines))
    cut = read(name, whole[: len(whole) // 2])
    assert [record.reason for record in cut if record.reason] == ["corrupt_file"]
    assert cut[-1].reason == "corrupt_file"
    flipped = bytearray(whole)
    flipped[len(whole) * 3 // 4] ^= 0xFF
    flipped[len(whole) * 3 // 4 + 1] ^= 0xFF
    damaged = read(name, bytes(flipped))
    assert damaged[-1].reason == "corrupt_file"
    good = [record.text for record in cut[:-1]]
    assert good == [json.loads(line)["text"].encode() for line in lines[: len(good)]]
    assert len(good) > 500
    assert [record.reason for record in read(name, b"this is not compressed")] == ["corrupt_file"]


@settings(derandomize=True, max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 60), max_size=30),
    st.lists(st.integers(0, 2000), max_size=4),
    st.integers(1, 50),
    st.booleans(),
)
def test_byte_ranges_share_no_line_and_lose_none(sizes: list[int], cuts: list[int], chunk: int, newline: bool) -> None:
    """Any cut of a file into byte ranges, read in chunks of any size, gives its lines once."""
    lines = [json.dumps({"text": f"{index}-" + "x" * size}).encode() for index, size in enumerate(sizes)]
    data = b"\n".join(lines) + (b"\n" if newline else b"")
    edges = [0, *sorted({cut for cut in cuts if cut < len(data)} - {0}), len(data)]
    before = readers.READ_BYTES
    readers.READ_BYTES = chunk
    try:
        whole = outcome(read("a.jsonl", data))
        parts = [outcome(read("a.jsonl", data, SETTINGS, start, stop)) for start, stop in zip(edges, edges[1:])]
    finally:
        readers.READ_BYTES = before
    assert [text for _, text in whole] == [json.loads(line)["text"] for line in lines]
    assert [record for part in parts for record in part] == whole


def test_parquet_by_row_group() -> None:
    texts = ["one", None, "three", "", "x" * 2000, "six", "seven"]
    table = pa.table({"text": texts, "id": [1, 2, 3, 4, 5, None, 7], "other": [0.0] * 7})
    data = parquet(table, row_group_size=3)
    expected = [
        ("a.parquet#0", "one"),
        ("a.parquet#1", "!missing_field"),
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
    monkeypatch.setattr(readers, "PAGE_BYTES", 20_000)
    monkeypatch.setattr(readers, "BATCH_BYTES", 10_000)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(readers, "READ_BYTES", 500)
    assert outcome(read("a.parquet", whole, settings)) == [(f"a.parquet#{row}", text) for row, text in enumerate(texts)]
    records = read("a.parquet", data, settings)
    (bad,) = [record for record in records if record.reason]
    assert (bad.location, bad.reason) == ("a.parquet#100", "page_too_large")
    assert b"column text has a page of 32," in bad.excerpt
    assert [record.text.decode() for record in records if not record.reason] == large[:100] + large[200:]


def test_a_dictionary_that_every_row_repeats_is_read_in_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 rows of 9 kB are 2 MB in memory, but 9 kB in the file."""
    data = parquet(pa.table({"text": ["y" * 9000] * 200}))
    monkeypatch.setattr(readers, "BATCH_BYTES", 20_000)
    seen = []
    rows = readers._rows

    def counted(path: str, row: int, batch: pa.RecordBatch, settings: ReaderSettings) -> object:
        seen.append(batch.num_rows)
        return rows(path, row, batch, settings)

    monkeypatch.setattr(readers, "_rows", counted)
    assert len(read("a.parquet", data, ReaderSettings("auto", "text", None, 10_000))) == 200
    assert max(seen) == 2
    monkeypatch.setattr(readers, "PAGE_BYTES", 8_000)
    (record,) = read("a.parquet", data)
    assert record.reason == "page_too_large"


def test_parquet_bad_columns() -> None:
    assert [text for _, text in outcome(read("a.parquet", parquet(pa.table({"body": ["a", "b"]}))))] == [
        "!missing_field"
    ] * 2
    numbers = parquet(pa.table({"text": pa.array([1, None])}))
    assert [text for _, text in outcome(read("a.parquet", numbers))] == ["!non_string_field", "!missing_field"]
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


def test_text_files() -> None:
    assert outcome(read("sub/a.md", "täxt".encode())) == [("sub/a.md", "täxt")]
    assert outcome(read("a.md", b"")) == [("a.md", "!empty_document")]
    assert outcome(read("a.md", b"caf\xe9")) == [("a.md", "!invalid_utf8")]
    assert outcome(read("a.md", b"x" * 1001)) == [("a.md", "!too_large")]
    for name, compress in (("a.md.gz", gzip.compress), ("a.md.zst", zstandard.ZstdCompressor().compress)):
        assert outcome(read(name, compress(b"x" * 1000))) == [(name, "x" * 1000)]
        assert outcome(read(name, compress(b"x" * 1001))) == [(name, "!too_large")]
        assert outcome(read(name, b"this is not compressed")) == [(name, "!corrupt_file")]


def test_fields_are_configurable() -> None:
    configured = ReaderSettings("jsonl", "content", "url", 1000)
    (record,) = read("any.txt", b'{"content": "abc", "url": "http://x"}', configured)
    assert (record.text, record.doc_id) == (b"abc", "http://x")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), ConnectionResetError("reset"), TimeoutError()], ids=repr
)
def test_a_failing_storage_is_not_a_bad_record(name: str, error: OSError) -> None:
    class Failing(io.RawIOBase):
        def readinto(self, buffer: object) -> int:
            raise error

        def readable(self) -> bool:
            return True

        def seekable(self) -> bool:
            return True

        def seek(self, offset: int, whence: int = 0) -> int:
            return 1000

        def tell(self) -> int:
            return 1000

    with pytest.raises(type(error)):
        list(read_slice(Slice(name, 1000, ""), Failing(), SETTINGS))


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_two_gigabyte_line_needs_little_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    openers = {
        "l": lambda: path.open("wb"),
        "z": lambda: gzip.GzipFile(path, "wb", compresslevel=1),
        "t": lambda: zstandard.ZstdCompressor().stream_writer(path.open("wb")),
    }
    with openers[name[-1]]() as file:
        file.write(b'{"text": "first"}\n{"text": "')
        for _ in range(2048):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"text": "last"}\n')
    program = (
        "import sys\nfrom data_prep.plan import Slice\nfrom data_prep.readers import *\n"
        "path = sys.argv[1]\n"
        f"part = Slice('{name}', 1, '')\n"
        "found = [r.reason or r.text.decode() for r in read_slice(part, open(path, 'rb'), ReaderSettings('auto', 'text', None, 64 << 20))]\n"
        "assert found == ['first', 'too_large', 'last'], found\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert int(done.stdout) * 1024 < 400 << 20


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
        [sys.executable, "-c", program, str(path)], capture_output=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert int(done.stdout) * 1024 < 300 << 20
