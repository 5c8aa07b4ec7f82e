"""One packed Parquet file: its footer, and its row groups decoded without a Python loop over tokens.

Reading takes a `fetch(start, stop) -> bytes`, so that the caller decides where bytes come from and counts them. The footer
is one fetch of the file's last bytes, as many as our writer needs for the row groups announced; a row group is one fetch
of its adjacent column chunks.
Bytes are checked against the manifest's CRC-32 before anything interprets them.

Errors: `CorruptBlock` (a ValueError) names the file, the row group or "footer", and what was found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.manifest import DatasetManifest, PackedFile
from pipeline.packed import HEX_DIGITS, crc32_hex, group_bounds
from pipeline.parquet_pages import page_header
from pipeline.storage import Storage

Fetch = Callable[[int, int], bytes]

_FOOTER_BYTES, _FOOTER_BYTES_PER_GROUP = 1024, 160  # a generous guess: 120 and 125 without statistics


class CorruptBlock(ValueError):
    """Stored bytes are not what was written."""

    def __init__(self, path: str, row_group: int | None, what: str) -> None:
        super().__init__(f"{path}: {'footer' if row_group is None else f'row group {row_group}'}: {what}")
        self.path, self.row_group, self.what = path, row_group, what


class Layout(NamedTuple):
    """What all packed files of a dataset share."""

    dtype: np.dtype  # of a token, little-endian
    group_rows: int
    row_tokens: int

    @classmethod
    def of(cls, dataset: DatasetManifest) -> Layout:
        dtype = np.dtype(dataset.token_dtype).newbyteorder("<")
        return cls(dtype, dataset.rows_per_group, dataset.sequence_length)


class Footer(NamedTuple):
    metadata: pq.FileMetaData
    bounds: list[int]  # row group i is bytes [bounds[i], bounds[i + 1])


@dataclass(frozen=True)
class Block:
    """A decoded row group of R rows of L tokens."""

    tokens: NDArray[np.unsignedinteger]  # [R, L] as stored
    lengths: NDArray[np.int32]  # document lengths of all rows, concatenated
    offsets: NDArray[np.int32]  # [R + 1] row r has lengths[offsets[r]:offsets[r + 1]]

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.lengths.nbytes + self.offsets.nbytes

    @cached_property
    def _bounds(self) -> list[int]:
        return self.offsets.tolist()

    def document_lengths(self, row: int) -> list[int]:
        return self.lengths[self._bounds[row] : self._bounds[row + 1]].tolist()


def fetch_range(storage: Storage, entry: PackedFile, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file in one request, fewer where it ends before; retries are the file system's."""
    try:
        data: bytes = storage.fs.cat_file(storage.key(entry.path), start=start, end=stop)
    except OSError as error:
        response = getattr(error.__cause__, "response", {})
        if response.get("Error", {}).get("Code") == "InvalidRange":
            return b""
        raise
    return data


def read_footer(fetch: Fetch, entry: PackedFile, layout: Layout) -> Footer:
    groups = entry.rows // layout.group_rows
    start = max(0, entry.bytes - _FOOTER_BYTES - _FOOTER_BYTES_PER_GROUP * groups)
    tail = fetch(start, entry.bytes)
    if start + len(tail) != entry.bytes or tail[-4:] != b"PAR1":
        raise CorruptBlock(
            entry.path, None, f"no end of a Parquet file at byte {entry.bytes}: cut short or overwritten"
        )
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if length > entry.bytes:
        raise CorruptBlock(entry.path, None, f"a length of {length} in a file of {entry.bytes} bytes")
    if length > len(tail):
        tail = fetch(entry.bytes - length, entry.bytes)
    _check_crc32(entry, groups, tail[-length:])
    try:
        metadata = pq.read_metadata(pa.BufferReader(tail[-length:]))
        bounds = group_bounds(metadata)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptBlock(entry.path, None, str(error)) from error
    if (metadata.num_rows, metadata.num_row_groups) != (entry.rows, groups):
        found = f"{metadata.num_rows} rows in {metadata.num_row_groups} row groups"
        raise CorruptBlock(entry.path, None, f"{found}, expected {entry.rows} in {groups}")
    if bounds[-1] != entry.bytes - length:
        raise CorruptBlock(
            entry.path, None, f"row groups end at byte {bounds[-1]}, the footer begins at {entry.bytes - length}"
        )
    return Footer(metadata, bounds)


def read_group(fetch: Fetch, entry: PackedFile, layout: Layout, footer: Footer, group: int) -> tuple[Block, bytes]:
    """A row group decoded, and its bytes. A wrong checksum is given one second reading: bytes can be hurt on the way."""
    start, stop = footer.bounds[group], footer.bounds[group + 1]
    data = fetch(start, stop)
    try:
        return _decode_group(entry, layout, footer, group, data), data
    except CorruptBlock:
        data = fetch(start, stop)
        return _decode_group(entry, layout, footer, group, data), data


def _decode_group(entry: PackedFile, layout: Layout, footer: Footer, group: int, data: bytes) -> Block:
    start, stop = footer.bounds[group], footer.bounds[group + 1]
    if len(data) != stop - start:
        raise CorruptBlock(entry.path, group, f"{len(data)} bytes at offset {start}, expected {stop - start}")
    _check_crc32(entry, group, data)
    try:
        tokens = _tokens(data, footer.metadata, group, start, layout)
        window = pa.PythonFile(_Window(data, start, entry.bytes), mode="r")
        file = pq.ParquetFile(window, metadata=footer.metadata)
        table = file.read_row_group(group, columns=["doc_lens"], use_threads=False)
        return Block(tokens, *_lengths(table, layout))
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise CorruptBlock(entry.path, group, str(error)) from error


def _tokens(
    data: bytes, metadata: pq.FileMetaData, group: int, start: int, layout: Layout
) -> NDArray[np.unsignedinteger]:
    """[R, L] of a row group whose bytes begin at `start` of the file: each page is decompressed to where it stays.

    Arrow would check each page's own CRC-32, decompress it, and copy it into an array; the row group's was checked already.
    Raises ValueError for another layout than our writer's: no nulls, plain values, zstd.
    """
    column, schema = metadata.row_group(group).column(0), metadata.schema.column(0)
    width = layout.row_tokens * layout.dtype.itemsize
    found = (schema.name, schema.physical_type, schema.length, schema.max_definition_level, column.compression)
    if found != ("tokens", "FIXED_LEN_BYTE_ARRAY", width, 0, "ZSTD") or column.has_dictionary_page:
        raise ValueError(f"column 0 is {found}, expected tokens of {width} bytes a row without nulls, plain, in zstd")
    view, source, codec = memoryview(data), pa.BufferReader(data), _zstd()
    position, pages = column.data_page_offset - start, []
    end = position + column.total_compressed_size
    while position < end:
        header, uncompressed, compressed = page_header(source, position)
        body = view[position + header : position + header + compressed]
        pages.append(np.frombuffer(codec.decompress(body, uncompressed), layout.dtype))
        position += header + compressed
    tokens = pages[0] if len(pages) == 1 else np.concatenate(pages)
    if tokens.size != layout.group_rows * layout.row_tokens:
        raise ValueError(f"{tokens.size} tokens, expected {layout.group_rows} rows of {layout.row_tokens}")
    return tokens.reshape(-1, layout.row_tokens)


@cache
def _zstd() -> pa.Codec:
    return pa.Codec("zstd")


def _check_crc32(entry: PackedFile, part: int, data: bytes) -> None:
    """Part i is row group i; the part after the last row group is the footer."""
    expected = entry.group_crc32[part * HEX_DIGITS : (part + 1) * HEX_DIGITS]
    found = crc32_hex(data)
    if found != expected:
        is_footer = (part + 1) * HEX_DIGITS == len(entry.group_crc32)
        raise CorruptBlock(entry.path, None if is_footer else part, f"CRC-32 is {found}, expected {expected}")


def _lengths(table: pa.Table, layout: Layout) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Document lengths of all rows, and where each row's begin. Raises ValueError on another shape than ours."""
    if len(table) != layout.group_rows:
        raise ValueError(f"{len(table)} rows, expected {layout.group_rows}")
    lengths = table.column("doc_lens").combine_chunks()
    if isinstance(lengths, pa.ChunkedArray):
        lengths = lengths.chunk(0)
    if lengths.null_count or lengths.type.value_type != pa.int32():
        raise ValueError(f"column doc_lens has nulls, or is {lengths.type} and not list<int32>")
    offsets = lengths.offsets.to_numpy()
    return lengths.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0]


class _Window:
    """A file of `size` bytes of which only those from `start` on are here: what Arrow needs to decode one row group."""

    def __init__(self, data: bytes, start: int, size: int) -> None:
        self._data, self._start, self._size = memoryview(data), start, size
        self._position = 0
        self.closed = False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def size(self) -> int:
        return self._size

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def read(self, size: int) -> memoryview:
        first = self._position - self._start
        if first < 0 or first + size > len(self._data):
            raise ValueError(f"bytes {self._position} to {self._position + size} lie outside the row group")
        self._position += size
        return self._data[first : first + size]

    def close(self) -> None:
        self.closed = True

    def flush(self) -> None:
        pass
