"""Reading bytes as a file, for all readers' tests."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.plan import Slice
from data_prep.readers import ReaderSettings, Record, read_slice

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
