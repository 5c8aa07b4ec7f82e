"""How large the pages of a Parquet column are, before any of them is decompressed.

A reader holds one page at a time, compressed, decompressed and copied into an array, so a page decides the memory. The
footer tells only sizes of whole column chunks; each page's are in the header before it, a Thrift compact struct whose
fields 2 and 3 are the uncompressed and the compressed size of what follows (parquet-format, parquet.thrift, PageHeader).
Only headers are read here, 256 bytes a page.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

HEADER_BYTES = 256  # read at first; statistics may need more
MAX_HEADER_BYTES = 1 << 20
UNCOMPRESSED, COMPRESSED = 2, 3
STOP, TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(13)


def page_sizes(file: pa.NativeFile, column: pq.ColumnChunkMetaData) -> Iterator[int]:
    """Uncompressed bytes of each page in file order, a dictionary page first. Raises ArrowInvalid where there is no header."""
    position = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
    end = position + column.total_compressed_size
    while position < end:
        header, uncompressed, compressed = page_header(file, position)
        yield uncompressed
        position += header + compressed


def page_header(file: pa.NativeFile, position: int) -> tuple[int, int, int]:
    """Length of the page header at `position`, uncompressed and compressed size of the page."""
    size = HEADER_BYTES
    while size <= MAX_HEADER_BYTES:
        data = file.read_at(size, position)
        try:
            length, fields = _struct(data, 0)
            if min(fields[UNCOMPRESSED], fields[COMPRESSED]) < 0:
                break
            return length, fields[UNCOMPRESSED], fields[COMPRESSED]
        except IndexError:  # longer than what was read
            if len(data) < size:
                break
            size *= 16
        except KeyError:
            break
    raise pa.ArrowInvalid(f"no page header at byte {position}")


def _struct(data: bytes, position: int) -> tuple[int, dict[int, int]]:
    """Where the struct ends, and its integer fields. Raises IndexError where the data end first, KeyError for no struct."""
    fields: dict[int, int] = {}
    field = 0
    while (head := data[position]) != STOP:
        position += 1
        field += head >> 4
        if not head >> 4:
            field, position = _integer(data, position)
        if head & 15 in (I16, I32, I64):
            fields[field], position = _integer(data, position)
        elif head & 15 not in (TRUE, FALSE):  # whose value is the type
            position = _skip(data, position, head & 15)
    return position + 1, fields


def _skip(data: bytes, position: int, kind: int) -> int:
    if kind in (I16, I32, I64):
        return _integer(data, position)[1]
    if kind == BINARY:
        length, position = _varint(data, position)
        return position + length
    if kind == STRUCT:
        return _struct(data, position)[0]
    if kind in (LIST, SET):
        count, element = data[position] >> 4, data[position] & 15
        position += 1
        if count == 15:
            count, position = _varint(data, position)
        for _ in range(min(count, len(data))):
            position = _skip(data, position, element)
        return position
    return position + {TRUE: 1, FALSE: 1, BYTE: 1, DOUBLE: 8}[kind]


def _integer(data: bytes, position: int) -> tuple[int, int]:
    value, position = _varint(data, position)
    return value >> 1 ^ -(value & 1), position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
