"""Arrow IPC as Hugging Face datasets and Feather write it; oracle: the table that was written."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pytest

from data_prep.readers import ReaderSettings, arrow_ipc
from tests.data_prep.readers.common import outcome, read
from tests.data_prep.readers.test_parquet import BYTES, OTHER_COLUMNS, TEXT_COLUMNS, TEXTS

EXPECTED = [(f"a.arrow#{row}", text or "!null_field") for row, text in enumerate(TEXTS)]


def stream(table: pa.Table, rows: int = 1000, options: pa.ipc.IpcWriteOptions | None = None) -> bytes:
    """As datasets' ArrowWriter does: a stream, a batch per 1,000 rows."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows)
    return sink.getvalue()


def file(table: pa.Table, rows: int = 1000) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return sink.getvalue()


def feathered(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    feather.write_feather(table, sink, **options)
    return sink.getvalue()


FORMS = {
    "stream": stream,
    "file": file,
    "feather": feathered,
    "zstd": lambda table: feathered(table, compression="zstd", chunksize=2),
    "small batches": lambda table: stream(table, 1),
}
MORE_COLUMNS = {
    "runs of views": pa.RunEndEncodedArray.from_arrays([1, 2, 3, 4], pa.array(TEXTS, pa.string_view())),
    "run-end encoded": pa.RunEndEncodedArray.from_arrays([1, 2, 3, 4], TEXTS),
    "dictionary of views": pa.DictionaryArray.from_arrays(
        [0, 1, None, 2], pa.array([TEXTS[0], TEXTS[1], TEXTS[3]], pa.string_view())
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", {**TEXT_COLUMNS, **MORE_COLUMNS})
def test_every_type(form: str, name: str) -> None:
    column = {**TEXT_COLUMNS, **MORE_COLUMNS}[name]
    data = FORMS[form](pa.table({"other": [0.5] * 4, "text": column, "more": ["x"] * 4}))
    assert outcome(read("a.arrow", data)) == EXPECTED


@pytest.mark.parametrize("name", OTHER_COLUMNS)
def test_what_is_no_text(name: str) -> None:
    first, second = read("a.feather", file(pa.table({"text": OTHER_COLUMNS[name]})))
    assert first.reason == ("null_field" if name == "null" else "non_string_field")
    assert second.reason == "null_field"


def test_ids_nested_fields_and_missing_ones() -> None:
    table = pa.table(
        {"meta": pa.array([{"text": "a", "id": 2**63}, None], pa.struct([("text", pa.string()), ("id", pa.uint64())]))}
    )
    records = read("a.arrow", stream(table), ReaderSettings("auto", "meta.text", "meta.id", 1000))
    assert (records[0].text, records[0].doc_id) == (b"a", str(2**63))
    assert records[1].reason == "null_field"
    (missing,) = read("a.arrow", stream(pa.table({"body": ["a"]})))
    assert (missing.reason, missing.excerpt) == ("missing_field", b"the columns are body")
    assert read("a.arrow", stream(pa.table({"text": pa.array([], pa.string())}))) == []


@pytest.mark.parametrize("form", [stream, file])
@pytest.mark.parametrize("dictionary", [False, True])
def test_a_batch_that_does_not_fit_is_passed_over(form: Any, dictionary: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{row}" for row in range(30)]
    texts[10:20] = [f"{row}" + "x" * 900 for row in range(10)]
    column = pa.array(texts)
    table = pa.table(
        {"kind": pa.array(["a", "b", "c"] * 10).dictionary_encode() if dictionary else ["a"] * 30, "text": column}
    )
    data = form(table, 10)
    monkeypatch.setattr(arrow_ipc, "BATCH_BYTES", 5000)
    records = read("a.arrow", data)
    assert [record.text.decode() for record in records if not record.reason] == texts[:10] + texts[20:]
    (large,) = [record for record in records if record.reason]
    assert (large.location, large.reason) == ("a.arrow#10", "batch_too_large")
    assert records[-1].location == "a.arrow#29"


def test_a_batch_counts_as_it_decompresses(monkeypatch: pytest.MonkeyPatch) -> None:
    data = feathered(pa.table({"text": ["x" * 900] * 100}), compression="zstd")
    assert len(data) < 5000
    monkeypatch.setattr(arrow_ipc, "BATCH_BYTES", 5000)
    (record,) = read("a.feather", data)
    assert record.reason == "batch_too_large"


@pytest.mark.parametrize("form", [stream, file])
def test_damage(form: Any) -> None:
    table = pa.table({"text": [f"document {row}" for row in range(50)]})
    data = form(table, 10)
    whole = [record.text for record in read("a.arrow", data)]
    assert len(whole) == 50
    for size in range(0, len(data) - 1, 37):
        records = read("a.arrow", data[:size])
        good = [record.text for record in records if not record.reason]
        assert good == whole[: len(good)]
        ended = form is file and good == whole  # cut within the footer
        assert ended or [record.reason for record in records if record.reason] == ["corrupt_file"], size
    for size in (0, 1, 8, 100):
        assert [record.reason for record in read("a.arrow", b"\x07" * size)] == ["corrupt_file"]
    assert [record.reason for record in read("a.feather", b"FEA1" + data)] == ["corrupt_file"]


def test_offsets_outside_of_the_buffers_are_damage() -> None:
    texts = pa.array(["one", "two", "three"])
    data = bytearray(stream(pa.table({"text": texts})))
    offsets = b"".join(number.to_bytes(4, "little") for number in (0, 3, 6, 11))
    place = data.index(offsets)
    data[place + 8 : place + 12] = (1 << 30).to_bytes(4, "little")
    assert [record.reason for record in read("a.arrow", bytes(data))] == ["corrupt_file"]


def test_text_that_is_not_utf8_costs_itself() -> None:
    for kind in (pa.string(), pa.large_string()):
        strings = pa.Array.from_buffers(
            kind, 2, pa.array([b"ok", b"\xff\xfe"], pa.binary() if kind == pa.string() else pa.large_binary()).buffers()
        )
        assert [text for _, text in outcome(read("a.arrow", stream(pa.table({"text": strings}))))] == [
            "ok",
            "!invalid_utf8",
        ]
    assert BYTES[0] == b"one"
