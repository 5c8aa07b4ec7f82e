"""Parquet, row group by row group, in bounded memory: where a page is damaged, the rest of its row group is one record, and the next goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.plan import Slice
from data_prep.readers import compression
from data_prep.readers.columns import records, wanted_columns
from data_prep.readers.record import ReaderSettings, Record, corrupt, is_in_the_data
from pipeline.parquet_pages import page_sizes

BATCH_ROWS = 512
CHUNK_BYTES = 128 * 1024 * 1024  # larger column chunks are not read as a whole
PAGE_BYTES = 512 * 1024 * 1024  # larger pages are not read at all (pyarrow writes 1,024 rows a page, be they books)
BATCH_BYTES = 128 * 1024 * 1024  # of a batch, where a page's size bounds it


def row_group_bytes(file: IO[bytes]) -> list[int] | None:
    """Compressed bytes of each row group; None if the footer is damaged."""
    try:
        metadata = pq.ParquetFile(file).metadata
    except (pa.ArrowInvalid, OSError) as error:
        if not is_in_the_data(error):
            raise
        return None
    groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
    return [
        sum(group.column(column).total_compressed_size for column in range(metadata.num_columns)) for group in groups
    ]


def read_parquet(part: Slice, file: IO[bytes], settings: ReaderSettings) -> Iterator[Record]:
    source = pa.PythonFile(file, "r")
    try:
        parquet = pq.ParquetFile(source, page_checksum_verification=True)
    except (pa.ArrowInvalid, OSError) as error:
        yield corrupt(f"{part.path}#0", error)
        return
    metadata, schema = parquet.metadata, parquet.schema_arrow
    wanted = wanted_columns(schema, settings)
    row = sum(metadata.row_group(group).num_rows for group in range(part.start))
    for group in range(part.start, metadata.num_row_groups if part.stop is None else part.stop):
        facts = metadata.row_group(group)
        end = row + facts.num_rows
        columns = [column for column in map(facts.column, range(facts.num_columns)) if _is_among(column, wanted)]
        reader = parquet
        if sum(column.total_compressed_size for column in columns) > CHUNK_BYTES:  # not all of it into memory
            options = {"pre_buffer": False, "buffer_size": compression.READ_BYTES}
            reader = pq.ParquetFile(source, page_checksum_verification=True, metadata=metadata, **options)
        try:
            rows, too_large = _memory_bound(source, columns)
            if too_large:
                yield Record(f"{part.path}#{row}", reason="page_too_large", excerpt=too_large.encode())
            else:
                for batch in reader.iter_batches(rows, [group], wanted, use_threads=False):
                    yield from records(part.path, row, batch, schema, settings)
                    row += batch.num_rows
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            yield corrupt(f"{part.path}#{row}", error)
        row = end


def _is_among(column: pq.ColumnChunkMetaData, wanted: list[str]) -> bool:
    path = str(column.path_in_schema)
    return any(path == name or path.startswith(name + ".") for name in wanted)


def _memory_bound(source: pa.NativeFile, columns: list[pq.ColumnChunkMetaData]) -> tuple[int, str]:
    """Rows to read at once, so that they need at most BATCH_BYTES or one row; or why a page of theirs is too large to read.

    No value is larger than its page. But values of a dictionary page may come up in every row, so it counts even where
    the whole column chunk is small.
    """
    rows = BATCH_ROWS
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
