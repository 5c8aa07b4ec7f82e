"""Row groups of packed files: one ranged read each, checksums verified, decoded without a Python loop over tokens.

A block is one Parquet row group of R packed rows. Its number counts through the files of its source in manifest order, so
block -> (file, row group) is a binary search over prefix sums. Opening a file reads its footer (one ranged read of at
most 64 KiB for 400 row groups); the parsed footers of the last files are kept. Reading a block is one ranged read of its
two adjacent column chunks. Every page's CRC is verified while decoding.

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
from pipeline.storage import Storage

_FOOTERS_KEPT = 128
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
        self._footers: OrderedDict[str, pq.FileMetaData] = OrderedDict()
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
        """One block from storage, past the cache."""
        entry, group = self.find(block)
        try:
            footer = self._footer(entry)
            if footer.num_rows != entry.rows or footer.num_row_groups != entry.rows // self.dataset.rows_per_group:
                raise CorruptBlock(
                    f"{entry.path}: the footer says {footer.num_rows} rows in {footer.num_row_groups} row groups, "
                    f"the manifest {entry.rows} in {entry.rows // self.dataset.rows_per_group}"
                )
            table = self._open(entry, footer).read_row_group(group, columns=["tokens", "doc_lens"], use_threads=False)
            data = decode(table, self._dtype, self.dataset.sequence_length)
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, (FileNotFoundError, PermissionError)):
                raise
            raise CorruptBlock(f"{entry.path}: row group {group}: {error}") from error
        with self._lock:
            self.counters.blocks += 1
        return data

    def _open(self, entry: PackedFile, footer: pq.FileMetaData | None) -> pq.ParquetFile:
        file = pa.PythonFile(_RangedFile(self._storage, entry, self.counters, self._lock), mode="r")
        return pq.ParquetFile(file, metadata=footer, pre_buffer=True, page_checksum_verification=True)

    def _footer(self, entry: PackedFile) -> pq.FileMetaData:
        with self._lock:
            if entry.path in self._footers:
                self._footers.move_to_end(entry.path)
                return self._footers[entry.path]
        footer = self._open(entry, None).metadata
        with self._lock:
            self._footers[entry.path] = footer
            if len(self._footers) > _FOOTERS_KEPT:
                self._footers.popitem(last=False)
        return footer


def decode(table: pa.Table, dtype: np.dtype, row_tokens: int) -> Block:
    """Arrow columns to arrays; the tokens stay in Arrow's buffer. Raises ValueError on another schema than ours."""
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


class _RangedFile:
    """The part of a file object that Arrow needs, each read one ranged request; the size is the manifest's."""

    def __init__(self, storage: Storage, entry: PackedFile, counters: ReadCounters, lock: threading.Lock) -> None:
        self._storage, self._entry, self._counters, self._lock = storage, entry, counters, lock
        self._position = 0
        self.closed = False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def size(self) -> int:
        return self._entry.bytes

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._entry.bytes)[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        stop = self._entry.bytes if size < 0 else min(self._position + size, self._entry.bytes)
        if stop <= self._position:
            return b""
        data: bytes = self._storage.fs.cat_file(self._storage.key(self._entry.path), start=self._position, end=stop)
        with self._lock:
            self._counters.requests += 1
            self._counters.bytes += len(data)
        self._position += len(data)
        return data

    def close(self) -> None:
        self.closed = True

    def flush(self) -> None:
        pass
