"""Page sizes from the headers, against what pyarrow's writer says in the footer."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.parquet_pages import page_header, page_sizes

TEXTS = [("word " * (1 + number % 700)) + str(number) for number in range(3000)]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize("statistics", [False, True])
def test_headers_and_pages_fill_the_column_chunk(
    version: str, compression: str, dictionary: bool, statistics: bool
) -> None:
    """The footer counts page headers in both of a chunk's sizes."""
    buffer = io.BytesIO()
    options = {"compression": compression, "use_dictionary": dictionary, "write_statistics": statistics}
    table = pa.table({"id": range(3000), "text": TEXTS})
    pq.write_table(
        table,
        buffer,
        row_group_size=1500,
        data_page_size=20_000,
        data_page_version=version,
        write_batch_size=50,
        **options,
    )
    file = pa.PythonFile(buffer, "r")
    metadata = pq.ParquetFile(file).metadata
    for group in range(2):
        for column in map(metadata.row_group(group).column, range(2)):
            position = start = column.dictionary_page_offset or column.data_page_offset
            sizes, headers = [], 0
            while position < start + column.total_compressed_size:
                header, uncompressed, compressed = page_header(file, position)
                position += header + compressed
                headers += header
                sizes.append(uncompressed)
            assert position == start + column.total_compressed_size
            assert sum(sizes) + headers == column.total_uncompressed_size
            assert list(page_sizes(file, column)) == sizes
            if column.path_in_schema == "text":
                assert len(sizes) > 10


def test_long_statistics() -> None:
    """A header holds the smallest and the largest value, here 5 kB each: more than is read at first."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["a" * 3000, "b" * 3000]}), buffer, compression="none", use_dictionary=False)
    file = pa.PythonFile(buffer, "r")
    column = pq.ParquetFile(file).metadata.row_group(0).column(0)
    header, uncompressed, _ = page_header(file, column.data_page_offset)
    assert header > 256
    assert header + uncompressed == column.total_compressed_size


def test_no_header() -> None:
    for data in (b"", b"\x00", b"\x15", b"\xff" * 5000, b"\x15\x00\x15\x01\x15\x02\x00"):
        with pytest.raises(pa.ArrowInvalid, match="no page header at byte 0"):
            page_header(pa.BufferReader(data), 0)
