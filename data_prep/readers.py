"""From a slice of a file to records, in constant memory whatever the file holds.

A reader yields `Record`s in file order: a document (UTF-8 bytes, an id, its location) or, where the record cannot be used,
the reason. Locations are `path@offset` (byte offset in the decompressed stream) for JSONL, `path#row` for Parquet, `path`
for a text file. Reasons: invalid_json, invalid_utf8, lone_surrogates, missing_field, non_string_field, empty_document,
too_large (a line or document over `corpus.max_document_bytes`; its bytes are skipped, never held), corrupt_file (the rest
of a damaged stream, or of a damaged Parquet row group, is one record), page_too_large (a Parquet row group that cannot be
read in bounded memory, as one record).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.pages import page_sizes
from data_prep.plan import Slice, format_of

READ_BYTES = 1024 * 1024
PARQUET_BATCH_ROWS = 512
CHUNK_BYTES = 128 * 1024 * 1024  # larger column chunks are not read as a whole
PAGE_BYTES = 512 * 1024 * 1024  # larger pages are not read at all (pyarrow writes 1,024 rows a page, be they books)
BATCH_BYTES = 128 * 1024 * 1024  # of a batch, where a page's size bounds it


@dataclass(slots=True)
class Record:
    location: str
    text: bytes = b""
    doc_id: str = ""
    reason: str = ""  # not empty: quarantined
    excerpt: bytes = b""  # the first bytes of a quarantined record


@dataclass(frozen=True)
class ReaderSettings:
    format: str
    text_field: str
    id_field: str | None
    max_document_bytes: int


def read_slice(part: Slice, file: IO[bytes], settings: ReaderSettings) -> Iterator[Record]:
    """All records of a slice; `file` is the opened (still compressed) file, seekable."""
    kind = format_of(part.path, settings.format)
    if kind == "parquet":
        return _read_parquet(part, file, settings)
    if kind == "jsonl":
        return _read_jsonl(part, file, settings)
    return _read_text(part, file, settings)


def _read_text(part: Slice, file: IO[bytes], settings: ReaderSettings) -> Iterator[Record]:
    limit = settings.max_document_bytes
    try:
        text = _decompressed(part.path, file).read(limit + 1)
    except (OSError, EOFError) as error:
        if not _is_in_the_data(error):
            raise
        yield Record(part.path, reason="corrupt_file", excerpt=str(error).encode()[:200])
        return
    if len(text) > limit:
        yield Record(part.path, reason="too_large", excerpt=text[:200])
    else:
        yield _checked(Record(part.path, text, part.path))


def _checked(record: Record) -> Record:
    """Quarantine what is empty or not UTF-8."""
    if not record.text:
        record.reason = "empty_document"
    elif not record.text.isascii():
        try:
            record.text.decode()
        except UnicodeDecodeError:
            record.reason, record.excerpt, record.text = "invalid_utf8", record.text[:200], b""
    return record


# -- JSONL -----------------------------------------------------------------------------------------------------------


def _read_jsonl(part: Slice, file: IO[bytes], settings: ReaderSettings) -> Iterator[Record]:
    for offset, line in _lines(part, file, settings.max_document_bytes):
        location = f"{part.path}@{offset}"
        if line is None:
            yield Record(location, reason="too_large")
        elif isinstance(line, str):
            yield Record(location, reason="corrupt_file", excerpt=line.encode())
        elif record := _parse(line, location, settings):
            yield record


def _parse(line: bytes | memoryview, location: str, settings: ReaderSettings) -> Record | None:
    """None for a blank line."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        line = bytes(line)
        if not line or line.isspace():
            return None
        return Record(location, reason=_why_unparsable(line), excerpt=line[:200])
    text = value.get(settings.text_field) if isinstance(value, dict) else None
    if not isinstance(text, str):
        reason = "missing_field" if text is None else "non_string_field"
        return Record(location, reason=reason, excerpt=bytes(line[:200]))
    if not text:
        return Record(location, reason="empty_document", excerpt=bytes(line[:200]))
    given = value.get(settings.id_field) if settings.id_field else None
    return Record(location, text.encode(), location if given is None else str(given))


def _why_unparsable(line: bytes) -> str:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError:
        return "invalid_utf8"
    except (ValueError, RecursionError):
        return "invalid_json"
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "lone_surrogates"
    return "invalid_json"  # Python reads what JSON forbids (NaN, Infinity)


def _lines(part: Slice, file: IO[bytes], limit: int) -> Iterator[tuple[int, bytes | memoryview | str | None]]:
    """(offset, line) of lines that begin in the slice; None for a line over `limit`, a str (the error) where the file breaks."""
    offset = part.start
    if part.start:
        # a line that begins exactly at `start` is ours: the byte before is its predecessor's end
        file.seek(part.start - 1)
        offset -= 1
    stream = _decompressed(part.path, file)
    pending: list[bytes] = []  # pieces of a line that is not complete yet
    pending_size, line_start, skip = 0, offset, bool(part.start)
    while True:
        try:
            chunk = stream.read(READ_BYTES)
        except (OSError, EOFError) as error:
            if not _is_in_the_data(error):
                raise
            yield line_start, f"{type(error).__name__}: {error}"
            return
        view, position = memoryview(chunk), 0
        while (end := chunk.find(b"\n", position)) >= 0:
            size = pending_size + end - position
            if not skip:
                whole = b"".join([*pending, view[position:end]]) if pending else view[position:end]
                yield line_start, (whole if size <= limit else None)
            pending, pending_size, skip, position = [], 0, False, end + 1
            line_start = offset + position
            if part.stop is not None and line_start >= part.stop:
                return
        pending_size += len(chunk) - position
        if pending_size > limit or skip:
            pending = []
        elif position < len(chunk):
            pending.append(chunk[position:])
        offset += len(chunk)
        if not chunk:
            break
    if not skip and pending_size:
        yield line_start, (b"".join(pending) if pending_size <= limit else None)


def _is_in_the_data(error: Exception) -> bool:
    """Arrow raises ArrowInvalid or a bare OSError for damaged bytes. With an errno, or a subclass, the storage failed."""
    return not isinstance(error, OSError) or (type(error) is OSError and error.errno is None)


def _decompressed(path: str, file: IO[bytes]) -> Any:
    name = path.lower()
    if name.endswith(".gz"):
        return pa.CompressedInputStream(pa.PythonFile(file, "r"), "gzip")
    if name.endswith(".zst"):
        return pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")
    return file


# -- Parquet ---------------------------------------------------------------------------------------------------------


def row_group_bytes(file: IO[bytes]) -> list[int] | None:
    """Compressed bytes of each row group; None if the footer is damaged."""
    try:
        metadata = pq.ParquetFile(file).metadata
    except (pa.ArrowInvalid, OSError) as error:
        if not _is_in_the_data(error):
            raise
        return None
    groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
    return [
        sum(group.column(column).total_compressed_size for column in range(metadata.num_columns)) for group in groups
    ]


def _read_parquet(part: Slice, file: IO[bytes], settings: ReaderSettings) -> Iterator[Record]:
    """Row group by row group: where a page is damaged, the rest of its row group is one record, and the next goes on."""
    source = pa.PythonFile(file, "r")
    try:
        parquet = pq.ParquetFile(source, page_checksum_verification=True)
    except (pa.ArrowInvalid, OSError) as error:
        yield _corrupt(part.path, 0, error)
        return
    metadata = parquet.metadata
    wanted = [name for name in (settings.text_field, settings.id_field) if name in parquet.schema_arrow.names]
    row = sum(metadata.row_group(group).num_rows for group in range(part.start))
    for group in range(part.start, metadata.num_row_groups if part.stop is None else part.stop):
        facts = metadata.row_group(group)
        end = row + facts.num_rows
        columns = [column for column in map(facts.column, range(facts.num_columns)) if _top(column) in wanted]
        reader = parquet
        if sum(column.total_compressed_size for column in columns) > CHUNK_BYTES:  # not all of it into memory
            options = {"pre_buffer": False, "buffer_size": READ_BYTES}
            reader = pq.ParquetFile(source, page_checksum_verification=True, metadata=metadata, **options)
        try:
            rows, too_large = _memory_bound(source, columns)
            if too_large:
                yield Record(f"{part.path}#{row}", reason="page_too_large", excerpt=too_large.encode())
            else:
                for batch in reader.iter_batches(rows, [group], wanted, use_threads=False):
                    yield from _rows(part.path, row, batch, settings)
                    row += batch.num_rows
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            yield _corrupt(part.path, row, error)
        row = end


def _top(column: pq.ColumnChunkMetaData) -> str:
    return str(column.path_in_schema.partition(".")[0])


def _memory_bound(source: pa.NativeFile, columns: list[pq.ColumnChunkMetaData]) -> tuple[int, str]:
    """Rows to read at once, so that they need at most BATCH_BYTES or one row; or why a page of theirs is too large to read.

    No value is larger than its page. But values of a dictionary page may come up in every row, so it counts even where
    the whole column chunk is small.
    """
    rows = PARQUET_BATCH_ROWS
    for column in columns:
        sizes = page_sizes(source, column)
        if column.total_uncompressed_size > BATCH_BYTES:
            largest = max(sizes, default=0)
        else:
            largest = next(sizes, 0) if column.has_dictionary_page else 0
        if largest > PAGE_BYTES:
            return 0, (
                f"the row group's column {column.path_in_schema} has a page of {largest:,} bytes; at most {PAGE_BYTES:,} "
                "are read: write it with smaller pages, without larger values"
            )
        rows = min(rows, BATCH_BYTES // max(largest, 1))
    return max(rows, 1), ""


def _corrupt(path: str, row: int, error: Exception) -> Record:
    if not _is_in_the_data(error):
        raise error
    return Record(f"{path}#{row}", reason="corrupt_file", excerpt=str(error).encode()[:200])


def _rows(path: str, first_row: int, batch: pa.RecordBatch, settings: ReaderSettings) -> Iterator[Record]:
    locations = [f"{path}#{first_row + row}" for row in range(batch.num_rows)]
    if settings.text_field not in batch.schema.names:
        for location in locations:
            yield Record(location, reason="missing_field")
        return
    texts = batch.column(settings.text_field)
    if pa.types.is_dictionary(texts.type):
        texts = texts.dictionary_decode()
    if not (_is_text(texts.type) or _is_binary(texts.type)):
        for location, valid in zip(locations, texts.is_valid().to_pylist()):
            yield Record(location, reason="non_string_field" if valid else "missing_field")
        return
    ids = locations
    if settings.id_field in batch.schema.names:
        given = batch.column(settings.id_field).to_pylist()
        ids = [location if value is None else str(value) for location, value in zip(locations, given)]
    large = pa.types.is_large_string(texts.type) or pa.types.is_large_binary(texts.type)
    values = texts.cast(pa.large_binary() if large else pa.binary()).to_pylist()
    for location, text, doc_id in zip(locations, values, ids):
        if text is None:
            yield Record(location, reason="missing_field")
        elif len(text) > settings.max_document_bytes:
            yield Record(location, reason="too_large", excerpt=text[:200])
        else:
            yield _checked(Record(location, text, doc_id))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
