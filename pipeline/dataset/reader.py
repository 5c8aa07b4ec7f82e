"""Blocks of a dataset by number: found by arithmetic, read once, cached, read ahead.

A block is one Parquet row group of R packed rows. Its number counts through the files of its source in manifest order, so
block -> (file, row group) is a binary search over prefix sums. The parsed footers of the last files are kept.

The cache holds decoded blocks (u16 or u32 tokens as stored) in least-recently-used order under a byte bound; the blocks of
one request are held until it is answered, however large. Prefetching fills the same cache from a few threads (decoding
releases the interpreter lock): it changes when a block is read, never what is returned.

Errors: `CorruptBlock` from packed_file.py; a missing file is FileNotFoundError.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from pipeline.dataset.packed_file import Block, Footer, Layout, fetch_range, read_footer, read_group
from pipeline.file_index import open_index
from pipeline.manifest import DatasetManifest, PackedFile
from pipeline.storage import Storage

_FOOTERS_KEPT = 128
_READ_THREADS = 4


class BlockId(NamedTuple):
    source: int  # index into dataset.sources
    number: int  # row group, counted through the source's files


@dataclass
class ReadCounters:
    """What was asked of storage, for progress lines, benchmarks and tests."""

    requests: int = 0
    bytes: int = 0
    blocks: int = 0
    footers: int = 0


class BlockReader:
    """Reads, verifies, decodes and caches blocks of one dataset. Safe to use from several threads."""

    def __init__(self, dataset: DatasetManifest, storage: Storage, cache_bytes: int) -> None:
        self.dataset = dataset
        self.layout = Layout.of(dataset)
        self.counters = ReadCounters()
        self._storage = storage
        self._cache_bytes = cache_bytes
        block_bytes = self.layout.group_rows * self.layout.row_tokens * self.layout.dtype.itemsize
        self.room = max(1, cache_bytes // block_bytes)  # blocks that fit the cache
        self._files = open_index(storage, dataset).packed
        self._groups = [
            np.concatenate([[0], np.cumsum(files.table["rows"].to_numpy() // dataset.rows_per_group)]).tolist()
            for files in self._files
        ]
        self._lock = threading.Lock()
        self._footers: OrderedDict[str, Future[Footer]] = OrderedDict()
        self._cache: OrderedDict[BlockId, Block] = OrderedDict()
        self._cached_bytes = 0
        self._pending: dict[BlockId, Future[Block]] = {}
        self._threads = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="blocks")

    def find(self, block: BlockId) -> tuple[PackedFile, int]:
        """The file of a block and its row group there."""
        groups = self._groups[block.source]
        assert 0 <= block.number < groups[-1], block
        file = bisect_right(groups, block.number) - 1
        return self._files[block.source][file], block.number - groups[file]

    def get(self, wanted: Iterable[BlockId]) -> dict[BlockId, Block]:
        """The blocks, from the cache, from reads under way, or read now in parallel."""
        found: dict[BlockId, Block] = {}
        futures: dict[BlockId, Future[Block]] = {}
        with self._lock:
            for block in dict.fromkeys(wanted):
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
            for block in list(dict.fromkeys(wanted))[: self.room]:
                if block not in self._cache:
                    self._start(block)

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    # -- inside --------------------------------------------------------------------------------------------------

    def _start(self, block: BlockId) -> Future[Block]:
        """The read of a block, begun unless it is under way. The lock is held."""
        if block not in self._pending:
            self._pending[block] = self._threads.submit(self._read_into_cache, block)
        return self._pending[block]

    def _read_into_cache(self, block: BlockId) -> Block:
        try:
            data = self._read(block)
        except BaseException:
            with self._lock:
                del self._pending[block]  # the next request tries again, and gets the error if it persists
            raise
        with self._lock:
            del self._pending[block]
            self._cache[block] = data
            self._cached_bytes += data.nbytes
            while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
                _, evicted = self._cache.popitem(last=False)
                self._cached_bytes -= evicted.nbytes
        return data

    def _read(self, block: BlockId) -> Block:
        entry, group = self.find(block)
        footer = self._footer(entry)
        decoded, _ = read_group(partial(self._fetch, entry), entry, self.layout, footer, group)
        with self._lock:
            self.counters.blocks += 1
        return decoded

    def _footer(self, entry: PackedFile) -> Footer:
        """Read by the first thread that needs it; the others wait for it."""
        with self._lock:
            future = self._footers.get(entry.path)
            if mine := future is None:
                future = self._footers[entry.path] = Future()
                self.counters.footers += 1
                if len(self._footers) > _FOOTERS_KEPT:
                    self._footers.popitem(last=False)
            else:
                self._footers.move_to_end(entry.path)
        if mine:
            try:
                future.set_result(read_footer(partial(self._fetch, entry), entry, self.layout))
            except BaseException as error:
                with self._lock:
                    self._footers.pop(entry.path, None)  # the next request tries again
                future.set_exception(error)
        return future.result()

    def _fetch(self, entry: PackedFile, start: int, stop: int) -> bytes:
        data = fetch_range(self._storage, entry, start, stop)
        with self._lock:
            self.counters.requests += 1
            self.counters.bytes += len(data)
        return data
