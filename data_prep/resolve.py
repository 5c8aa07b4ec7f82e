"""What no unit can see alone: the held-out split of a source, and exact duplicates across its units.

Precedence of equal documents: older generation, then order of the plan, then position in the unit; the first stays. That
does not depend on which unit was done first, and adding files never takes away an older unit's document.

Held-out: candidates are the documents whose hash falls under the fraction; of each source at most
`heldout_max_documents` are chosen, older generations first, then the smallest hashes. Copies of a chosen document, in any
source, are never trained on.

Duplicates: every unit has an index sorted by hash. A partition is a range of leading hash bytes; it reads that range of
every index of the source (ranged reads), sorts, and writes for every unit the ordinals of its documents that are copies.
Memory: about 60 bytes a document of the partition; partitions are sized to hold PARTITION_DOCUMENTS.

Across sources (an option) the same is done over the units of all sources: a document is a copy there if the first of its
equals, in the order in which the configuration names the sources, is in another source than its own.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_prep import hash_sorted
from data_prep.hash_sorted import MEND
from data_prep.records import UnitManifest
from data_prep.tokenize_unit import INDEX_DTYPE, token_dtype
from data_prep.writer import parquet_writer, put
from pipeline.config.schema import StorageConfig
from pipeline.integrity import DamagedFile, read_checked
from pipeline.manifest import HeldoutFile, TokenizerManifest, digest_of
from pipeline.storage import Storage, open_storage

PARTITION_DOCUMENTS = 4_000_000
READ_THREADS = 16
ORDINAL = np.dtype("<u4")
LONG = np.uint16(
    0xFFFE
)  # the rank, among who may stay, of a document that fits into no row: after those of all sources


@dataclass(frozen=True)
class Indexes:
    """Of the units of a source, or of all: what every partition of them reads, and is told once (mapping.py)."""

    paths: tuple[str, ...]  # in order of precedence; "" for a unit without documents
    owners: tuple[int, ...] = ()  # across sources: the number of each index's source


@dataclass(frozen=True)
class Partition:
    """Leading hash bytes [low, high) of a source, or of all."""

    source: str
    low: int
    high: int
    output: str  # path


@dataclass(frozen=True)
class Heldout:
    """The chosen documents of one source, as committed."""

    file: HeldoutFile | None
    hashes: frozenset[bytes]
    chosen: dict[str, list[int]]  # unit id -> ordinals


def partitions_of(
    source: str, units: Sequence[UnitManifest], folder: str, owners: Sequence[int] = ()
) -> tuple[Indexes, list[Partition]]:
    """A power of two of equal hash ranges, and what they read. Files are named after what they were made from.

    `owners`: the number of each unit's source, to find copies of other sources' documents alone.
    """
    documents = sum(unit.counts.docs_out for unit in units)
    count = 1
    while count < 256 and documents > count * PARTITION_DOCUMENTS:
        count *= 2
    paths = tuple(unit.index.path if unit.index else "" for unit in units)
    made_from = digest_of([[unit.index.sha256 if unit.index else "" for unit in units], list(owners)])[:16]
    edges = [256 * part // count for part in range(count + 1)]
    return Indexes(paths, tuple(owners)), [
        Partition(source, low, high, f"{folder}/{source}-{made_from}-{low:02x}-{high:03x}.duplicates")
        for low, high in zip(edges, edges[1:])
    ]


def find_duplicates(storage_config: StorageConfig, indexes: Mapping[str, Indexes], partition: Partition) -> str:
    """Write the partition's file: uint64 offsets [units + 1], uint64 digests [units] (`_digest_of`), then uint32 ordinals by unit.
    Returns its path."""
    storage, mine = open_storage(storage_config), indexes[partition.source]
    if storage.exists(partition.output):
        return partition.output

    def load(path: str) -> np.ndarray:
        return read_index(storage, path, partition.low, partition.high) if path else np.zeros(0, INDEX_DTYPE)

    with ThreadPoolExecutor(READ_THREADS) as pool:
        parts = list(pool.map(load, mine.paths))
    records = np.concatenate(parts) if parts else np.zeros(0, INDEX_DTYPE)
    unit_of = np.repeat(np.arange(len(parts), dtype=np.uint32), [len(part) for part in parts])
    order = np.lexsort((records["low"], records["high"]))  # stable: equal hashes stay in order of precedence
    high, low = records["high"][order], records["low"][order]
    copy = np.zeros(len(order), bool)
    copy[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    if mine.owners:
        owner = np.array(mine.owners, np.int64)[unit_of[order]]
        first = np.maximum.accumulate(np.where(copy, 0, np.arange(len(order))))  # of the equals
        copy &= owner[first] != owner
    copies = order[copy]
    units, ordinals = unit_of[copies], records["ordinal"][copies]
    arranged = np.lexsort((ordinals, units))
    edges = np.searchsorted(units[arranged], np.arange(len(parts) + 1))
    storage.write(partition.output, duplicates_bytes(np.split(ordinals[arranged], edges[1:-1])))
    return partition.output


def duplicates_bytes(ordinals: Sequence[np.ndarray]) -> bytes:
    """Of each unit the sorted ordinals of its documents that are left out, as `read_duplicates` reads them."""
    file = io.BytesIO()
    write_duplicates(file, len(ordinals), ordinals)
    return file.getvalue()


def write_duplicates(file: IO[bytes], units: int, ordinals: Iterable[np.ndarray], kind: np.dtype = ORDINAL) -> None:
    """The same into a file, a unit at a time; of another `kind` what else is told of documents."""
    offsets, digests = np.zeros(units + 1, "<u8"), np.zeros(units, "<u8")
    file.seek((2 * units + 1) * 8)
    for unit, found in enumerate(ordinals):
        data = found.astype(kind).tobytes()
        offsets[unit + 1] = offsets[unit] + np.uint64(len(found))
        digests[unit] = _digest_of(unit, (int(offsets[unit]), int(offsets[unit + 1])), data)
        file.write(data)
    file.seek(0)
    file.write(offsets.tobytes() + digests.tobytes())


def read_index(storage: Storage, path: str, low: int = 0, high: int = 256) -> np.ndarray:
    """Records of an index whose leading hash byte is in [low, high). Raises DamagedFile."""
    return hash_sorted.read(storage, path, INDEX_DTYPE, low, high)


def read_duplicates(storage: Storage, path: str, unit: int, units: int) -> np.ndarray:
    """Ordinals (int64, sorted) of the copies in the unit with that place in the plan. Raises DamagedFile."""
    return read_part(storage, path, unit, units, ORDINAL).astype(np.int64)


def read_part(storage: Storage, path: str, unit: int, units: int, kind: np.dtype) -> np.ndarray:
    """What `write_duplicates` was given of a unit. Raises DamagedFile."""
    with storage.open(path) as file:
        return _part(file, storage.uri(path), unit, units, kind)


def read_all_duplicates(storage: Storage, path: str, units: int) -> Callable[[int], np.ndarray]:
    """`read_duplicates` of any unit out of one read, for who needs those of all: a part alone costs a round trip or more. Memory: the
    file, 16 bytes a unit and 4 a document in it."""
    data, uri = storage.read(path), storage.uri(path)
    return lambda unit: _part(io.BytesIO(data), uri, unit, units, ORDINAL).astype(np.int64)


def _part(file: IO[bytes], uri: str, unit: int, units: int, kind: np.dtype) -> np.ndarray:
    size = kind.itemsize
    file.seek(unit * 8)
    span = file.read(16)
    start, stop = int.from_bytes(span[:8], "little"), int.from_bytes(span[8:], "little")
    file.seek((units + 1 + unit) * 8)
    digest = file.read(8)
    first = (2 * units + 1) * 8
    there = start <= stop <= (file.seek(0, os.SEEK_END) - first) // size  # a flipped offset may be anywhere
    file.seek(first + start * size if there else 0)
    data = file.read((stop - start) * size if there else 0)
    if len(digest) < 8 or _digest_of(unit, (start, stop), data) != int.from_bytes(digest, "little"):
        raise DamagedFile(f"{uri}: the copies of unit number {unit} are torn or changed; {MEND}")
    return np.frombuffer(data, kind)


def _digest_of(unit: int, span: tuple[int, int], ordinals: bytes) -> int:
    """xxh3 of a unit's part of a file of duplicates; where it lies is part of it."""
    found: int = xxhash.xxh3_64_intdigest(np.array([unit, *span], "<u8").tobytes() + ordinals)
    return found


def choose_heldout(
    storage: Storage,
    source: str,
    units: Sequence[UnitManifest],
    generations: Sequence[int],
    max_documents: int,
    tokenizer: TokenizerManifest,
) -> Heldout:
    """Choose, and write `datasets/heldout/<source>-<digest>.parquet` (tokens, n_bytes, doc_id; ordered by hash)."""

    def load(unit: UnitManifest) -> pa.Table:
        assert unit.candidates is not None
        return pq.ParquetFile(io.BytesIO(read_checked(storage, unit.candidates))).read()

    with_candidates = [place for place, unit in enumerate(units) if unit.candidates]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        tables = dict(zip(with_candidates, pool.map(load, [units[place] for place in with_candidates])))
    ranked = sorted(
        (generations[place], doc_hash, place, row)
        for place, table in tables.items()
        for row, doc_hash in enumerate(table["doc_hash"].to_pylist())
    )
    chosen: dict[bytes, tuple[int, int]] = {}
    for _, doc_hash, place, row in ranked:
        if doc_hash not in chosen and len(chosen) < max_documents:
            chosen[doc_hash] = (place, row)
    if not chosen:
        return Heldout(None, frozenset(), {})
    ordinals: dict[str, list[int]] = {}
    slices = []
    for doc_hash in sorted(chosen):
        place, row = chosen[doc_hash]
        ordinals.setdefault(units[place].id, []).append(tables[place]["ordinal"][row].as_py())
        slices.append(tables[place].slice(row, 1))
    table = pa.concat_tables(slices).combine_chunks()
    digest = hashlib.sha256(tokenizer.sha256.encode() + b"".join(sorted(chosen))).hexdigest()[:16]
    with TemporaryDirectory(prefix="heldout-") as folder:
        local = Path(folder) / "heldout.parquet"
        columns = table.select(["tokens", "n_bytes", "doc_id"])
        with parquet_writer(local, columns.schema) as writer:
            writer.write_table(columns)
        entry = put(storage, local, f"datasets/heldout/{source}-{digest}.parquet")
    itemsize = token_dtype(tokenizer.vocab_size).itemsize
    file = HeldoutFile(
        **entry.model_dump(),
        documents=table.num_rows,
        tokens=sum(map(len, table["tokens"].to_pylist())) // itemsize,
        text_bytes=sum(table["n_bytes"].to_pylist()),
    )
    return Heldout(file, frozenset(chosen), ordinals)
