"""Row groups of packed files: one ranged read each, checksums verified, decoded without a Python loop over tokens.

A block is one Parquet row group of R packed rows. Its number counts through the files of its source in manifest order, so
block -> (file, row group) is a binary search over prefix sums. Opening a file reads its footer (one ranged read of the
last 64 KiB, enough for 400 row groups); the parsed footers of the last files are kept. Reading a block is one ranged read
of its two adjacent column chunks. The manifest's CRC-32 of these bytes is checked, and every page's own while decoding.

The cache holds decoded blocks (u16 or u32 tokens as stored) in least-recently-used order under a byte bound; the blocks of
one request are always held, however large. Prefetching fills the same cache from a few threads: it changes when a block
is read, never what is returned.

Errors: `CorruptBlock` (a ValueError) names the file, the row group and what was found.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.manifest import DatasetManifest, PackedFile
from pipeline.packed import HEX_DIGITS, crc32_hex, group_bounds
from pipeline.storage import Storage

_FOOTERS_KEPT = 128
_TAIL_BYTES = 64 * 1024
_READ_THREADS = 4


class CorruptBlock(ValueError):
    """Stored bytes are not what was written; the message names file and row group."""


class BlockId(NamedTuple):
    source: int  # index into dataset.sources
    number: int  # row group, counted through the source's files


@dataclass(frozen=True)
class Block:
    tokens: NDArray[np.unsignedinteger]  # [R, L] as stored
    lengths: NDArray[np.int32]  # document lengths of all rows, concatenated
    offsets: NDArray[np.int32]  # [R + 1] row r has lengths[offsets[r]:offsets[r + 1]]

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.lengths.nbytes + self.offsets.nbytes

    def document_lengths(self, row: int) -> list[int]:
        return self.lengths[self.offsets[row] : self.offsets[row + 1]].tolist()


class _Footer(NamedTuple):
    metadata: pq.FileMetaData
    bounds: list[int]  # of the row groups, in bytes


@dataclass
class ReadCounters:
    """What went over the wire, for progress lines, benchmarks and tests."""

    requests: int = 0
    bytes: int = 0
    blocks: int = 0


class BlockReader:
    """Reads, verifies, decodes and caches blocks of one dataset. Safe to use from several threads."""

    def __init__(self, dataset: DatasetManifest, storage: Storage, cache_bytes: int) -> None:
        self.dataset = dataset
        self.counters = ReadCounters()
        self._storage = storage
        self._cache_bytes = cache_bytes
        self._dtype = np.dtype(dataset.token_dtype).newbyteorder("<")
        self._groups = [
            list(accumulate((file.rows // dataset.rows_per_group for file in source.packed), initial=0))
            for source in dataset.sources
        ]
        self._lock = threading.Lock()
        self._footers: OrderedDict[str, _Footer] = OrderedDict()
        self._cache: OrderedDict[BlockId, Block] = OrderedDict()
        self._cached_bytes = 0
        self._pending: dict[BlockId, Future[Block]] = {}
        self._threads = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="blocks")

    def find(self, block: BlockId) -> tuple[PackedFile, int]:
        """The file of a block and its row group there."""
        groups = self._groups[block.source]
        assert 0 <= block.number < groups[-1], block
        file = bisect_right(groups, block.number) - 1
        return self.dataset.sources[block.source].packed[file], block.number - groups[file]

    def get(self, wanted: Iterable[BlockId]) -> dict[BlockId, Block]:
        """The blocks, from the cache, from reads under way, or read now in parallel."""
        wanted = list(dict.fromkeys(wanted))
        found: dict[BlockId, Block] = {}
        futures: dict[BlockId, Future[Block]] = {}
        with self._lock:
            for block in wanted:
                if block in self._cache:
                    self._cache.move_to_end(block)
                    found[block] = self._cache[block]
                else:
                    futures[block] = self._start(block)
        for block, future in futures.items():
            found[block] = future.result()
        return found

    def prefetch(self, wanted: Iterable[BlockId]) -> None:
        """Start reading blocks that will be asked for soon, as far as the cache has room for them."""
        with self._lock:
            room = self._cache_bytes
            for block in dict.fromkeys(wanted):
                room -= self._block_bytes
                if room < 0:
                    return
                if block not in self._cache:
                    self._start(block)

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    # -- inside --------------------------------------------------------------------------------------------------

    @property
    def _block_bytes(self) -> int:
        return self.dataset.rows_per_group * self.dataset.sequence_length * self._dtype.itemsize

    def _start(self, block: BlockId) -> Future[Block]:
        """The read of a block, begun unless it is under way. The lock is held."""
        if block not in self._pending:
            self._pending[block] = self._threads.submit(self._read_into_cache, block)
        return self._pending[block]

    def _read_into_cache(self, block: BlockId) -> Block:
        try:
            data = self.read(block)
        except BaseException:
            with self._lock:
                del self._pending[block]  # the next request tries again
            raise
        with self._lock:
            del self._pending[block]
            self._cache[block] = data
            self._cached_bytes += data.nbytes
            while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
                _, evicted = self._cache.popitem(last=False)
                self._cached_bytes -= evicted.nbytes
        return data

    def read(self, block: BlockId) -> Block:
        """One block from storage, past the cache. Raises CorruptBlock."""
        entry, group = self.find(block)
        footer = self._footer(entry)
        start, stop = footer.bounds[group], footer.bounds[group + 1]
        data = self._fetch(entry, start, stop)
        expected = recorded_crc32(entry, group)
        if expected and crc32_hex(data) != expected:
            data = self._fetch(entry, start, stop)  # damaged on the way, perhaps: once more
            if crc32_hex(data) != expected:
                raise CorruptBlock(f"{entry.path}: row group {group}: CRC-32 is {crc32_hex(data)}, expected {expected}")
        try:
            file = pq.ParquetFile(
                pa.PythonFile(_Window(data, start, entry.bytes), mode="r"),
                metadata=footer.metadata,
                page_checksum_verification=True,
            )
            table = file.read_row_group(group, columns=["tokens", "doc_lens"], use_threads=False)
            decoded = decode(table, self._dtype, self.dataset.rows_per_group, self.dataset.sequence_length)
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise CorruptBlock(f"{entry.path}: row group {group}: {error}") from error
        with self._lock:
            self.counters.blocks += 1
        return decoded

    def _footer(self, entry: PackedFile) -> _Footer:
        with self._lock:
            if entry.path in self._footers:
                self._footers.move_to_end(entry.path)
                return self._footers[entry.path]
        footer = self._read_footer(entry)
        with self._lock:
            self._footers[entry.path] = footer
            if len(self._footers) > _FOOTERS_KEPT:
                self._footers.popitem(last=False)
        return footer

    def _read_footer(self, entry: PackedFile) -> _Footer:
        tail = self._fetch(entry, max(0, entry.bytes - _TAIL_BYTES), entry.bytes)
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if tail[-4:] != b"PAR1" or length > entry.bytes:
            raise CorruptBlock(f"{entry.path}: footer: the file does not end as Parquet does")
        if length > len(tail):
            tail = self._fetch(entry, entry.bytes - length, entry.bytes)
        try:
            metadata = pq.read_metadata(pa.BufferReader(tail[-length:]))
            bounds = group_bounds(metadata)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CorruptBlock(f"{entry.path}: footer: {error}") from error
        groups = entry.rows // self.dataset.rows_per_group
        if (metadata.num_rows, metadata.num_row_groups) != (entry.rows, groups):
            raise CorruptBlock(
                f"{entry.path}: footer: {metadata.num_rows} rows in {metadata.num_row_groups} row groups, "
                f"expected {entry.rows} in {groups}"
            )
        expected = recorded_crc32(entry, groups)
        found = crc32_hex(tail[-length:])
        if expected and (bounds[-1] != entry.bytes - length or found != expected):
            raise CorruptBlock(f"{entry.path}: footer: CRC-32 is {found}, expected {expected}")
        return _Footer(metadata, bounds)

    def _fetch(self, entry: PackedFile, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file in one request; retries are the file system's."""
        data: bytes = self._storage.fs.cat_file(self._storage.key(entry.path), start=start, end=stop)
        with self._lock:
            self.counters.requests += 1
            self.counters.bytes += len(data)
        if len(data) != stop - start:
            raise CorruptBlock(
                f"{entry.path}: {len(data)} bytes at offset {start}, expected {stop - start}: the file is cut short"
            )
        return data


def recorded_crc32(entry: PackedFile, part: int) -> str:
    """The manifest's CRC-32 of a row group, or of the footer (part = number of row groups)."""
    return entry.group_crc32[part * HEX_DIGITS : (part + 1) * HEX_DIGITS]


def decode(table: pa.Table, dtype: np.dtype, rows: int, row_tokens: int) -> Block:
    """Arrow columns to arrays; the tokens stay in Arrow's buffer. Raises ValueError on another shape than ours."""
    if len(table) != rows:
        raise ValueError(f"{len(table)} rows, expected {rows}")
    wide = pa.binary(row_tokens * dtype.itemsize)
    if table.schema.field("tokens").type != wide:
        raise ValueError(f"column tokens is {table.schema.field('tokens').type}, expected {wide}")
    tokens, lengths = table.column("tokens").combine_chunks(), table.column("doc_lens").combine_chunks()
    if isinstance(tokens, pa.ChunkedArray):
        tokens, lengths = tokens.chunk(0), lengths.chunk(0)
    if tokens.null_count or lengths.null_count or lengths.type != pa.list_(pa.int32()):
        raise ValueError(f"column tokens or doc_lens has nulls, or doc_lens is {lengths.type} and not list<int32>")
    flat = np.frombuffer(tokens.buffers()[1], dtype=dtype)[tokens.offset * row_tokens :][: len(tokens) * row_tokens]
    offsets = lengths.offsets.to_numpy()
    values = lengths.values.to_numpy()[offsets[0] : offsets[-1]]
    return Block(flat.reshape(len(tokens), row_tokens), values, offsets - offsets[0])


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

    def read(self, size: int) -> bytes:
        first = self._position - self._start
        if first < 0 or first + size > len(self._data):
            raise ValueError(f"bytes {self._position} to {self._position + size} lie outside the row group")
        self._position += size
        return bytes(self._data[first : first + size])

    def close(self) -> None:
        self.closed = True

    def flush(self) -> None:
        pass
