"""The reader of a slice, by what its file is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from data_prep.formats import format_of
from data_prep.plan import Slice
from data_prep.readers.arrow_ipc import read_arrow
from data_prep.readers.delimited import DELIMITERS, read_delimited
from data_prep.readers.json_documents import are_lines, read_json_documents
from data_prep.readers.lines import read_json_lines
from data_prep.readers.parquet import read_parquet
from data_prep.readers.record import ReaderSettings, Record
from data_prep.readers.text import read_text
from data_prep.readers.warc import read_warc


def read_slice(part: Slice, file: IO[bytes], settings: ReaderSettings) -> Iterator[Record]:
    """All records of a slice; `file` is the opened (still compressed) file, seekable."""
    kind = format_of(part.path, settings.format)
    if settings.conversations and kind not in ("json", "jsonl"):
        return iter([Record(part.path, reason="not_messages", excerpt=f"conversations in {kind}".encode())])
    if kind == "parquet":
        return read_parquet(part, file, settings)
    if kind == "arrow":
        return read_arrow(part, file, settings)
    if kind in DELIMITERS:
        return read_delimited(part, file, settings, DELIMITERS[kind])
    if kind == "text":
        return read_text(part, file, settings)
    if kind == "warc":
        return read_warc(part, file, settings)
    assert kind in ("json", "jsonl"), f"{part.path}: a file of no known format was planned"
    cut = part.start > 0 or part.stop is not None  # only lines are cut
    if kind == "json" and not cut and not are_lines(part.path, file):
        return read_json_documents(part, file, settings)
    return read_json_lines(part, file, settings)
