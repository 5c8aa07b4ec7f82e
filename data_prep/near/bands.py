"""Documents whose bands are equal: of every band and range of hashes, over the signature files of all units.

A partition reads its range of every file (ranged reads), sorts, and writes an edge from the first document of each group of equal
hashes to every other one. Memory: about 50 bytes a record of the partition, of which there are at most PARTITION_RECORDS a band.
Documents are numbered over all units, in order of the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.hash_sorted import MEND
from data_prep.near.file import RECORD, read_band
from data_prep.records import UnitManifest
from data_prep.resolve import READ_THREADS
from pipeline.config.near import NearDuplicates
from pipeline.config.schema import StorageConfig
from pipeline.integrity import DamagedFile
from pipeline.manifest import digest_of
from pipeline.storage import Storage, open_storage

PARTITION_RECORDS = 4_000_000
EDGE = np.dtype([("first", "<u8"), ("other", "<u8")])


@dataclass(frozen=True)
class Corpus:
    """Of all units, in order of the plan: what every partition reads."""

    paths: tuple[str, ...]  # of signature files; "" for a unit without
    documents: tuple[int, ...]  # in the unit's shard
    owners: tuple[int, ...]  # number of its source, in the order in which the configuration names them

    @property
    def bases(self) -> NDArray[np.int64]:
        """The number of each unit's first document, then that of all documents."""
        return np.concatenate([[0], np.cumsum(self.documents, dtype=np.int64)]).astype(np.int64)


@dataclass(frozen=True)
class BandPartition:
    """Bands [first, last), leading hash bytes [low, high)."""

    first: int
    last: int
    low: int
    high: int
    output: str


def corpus_of(units: Sequence[UnitManifest], owners: Sequence[int]) -> Corpus:
    paths = tuple(unit.bands.path if unit.bands else "" for unit in units)
    return Corpus(paths, tuple(unit.counts.docs_out for unit in units), tuple(owners))


def band_partitions(units: Sequence[UnitManifest], settings: NearDuplicates, folder: str) -> list[BandPartition]:
    """All bands at once where they are few records; a band at a time, or parts of one, where they are many. Files are named after what
    they were made from."""
    documents = sum(unit.counts.docs_out for unit in units if unit.bands)
    parts = 1
    while parts < 256 and documents > parts * PARTITION_RECORDS:
        parts *= 2
    step = max(1, min(settings.bands, PARTITION_RECORDS // max(1, documents)))
    made_from = digest_of([unit.bands.sha256 if unit.bands else "" for unit in units])[:16]
    edges = [256 * part // parts for part in range(parts + 1)]
    return [
        BandPartition(
            band,
            min(band + step, settings.bands),
            low,
            high,
            f"{folder}/near-{made_from}-{band:02}-{low:02x}-{high:03x}.edges",
        )
        for band in range(0, settings.bands, step)
        for low, high in zip(edges, edges[1:])
    ]


def find_edges(storage_config: StorageConfig, corpus: Corpus, partition: BandPartition) -> str:
    """Write the partition's file: xxh3 of the rest, then EDGEs, each once. Returns its path."""
    storage = open_storage(storage_config)
    if not storage.exists(partition.output):
        found = [_edges_of_band(storage, corpus, partition, band) for band in range(partition.first, partition.last)]
        data = _each_once(np.concatenate(found)).tobytes()
        storage.write(partition.output, xxhash.xxh3_64_intdigest(data).to_bytes(8, "little") + data)
    return partition.output


def _edges_of_band(storage: Storage, corpus: Corpus, partition: BandPartition, band: int) -> NDArray[np.void]:
    def load(path: str) -> NDArray[np.void]:
        return read_band(storage, path, band, partition.low, partition.high) if path else np.zeros(0, RECORD)

    with ThreadPoolExecutor(READ_THREADS) as pool:
        parts = list(pool.map(load, corpus.paths))
    bases = corpus.bases
    numbers = [part["ordinal"].astype(np.uint64) + np.uint64(base) for part, base in zip(parts, bases)]
    hashes = np.concatenate([part["hash"] for part in parts])
    number = np.concatenate(numbers)
    order = np.argsort(hashes, kind="stable")  # equal ones stay in the order of their numbers
    hashes, number = hashes[order], number[order]
    again = np.append(False, hashes[1:] == hashes[:-1])[: len(hashes)]
    first = np.maximum.accumulate(np.where(again, 0, np.arange(len(hashes)))) if len(hashes) else order
    edges = np.empty(int(again.sum()), EDGE)
    edges["first"], edges["other"] = number[first[again]], number[again]
    return edges


def _each_once(edges: NDArray[np.void]) -> NDArray[np.void]:
    edges = edges[np.lexsort((edges["other"], edges["first"]))]
    again = (edges["first"][1:] == edges["first"][:-1]) & (edges["other"][1:] == edges["other"][:-1])
    return edges[~np.append(False, again)[: len(edges)]]


def read_edges(storage: Storage, path: str) -> NDArray[np.void]:
    """Raises DamagedFile."""
    data = storage.read(path)
    if xxhash.xxh3_64_intdigest(data[8:]) != int.from_bytes(data[:8], "little"):
        raise DamagedFile(f"{storage.uri(path)}: torn or changed; {MEND}")
    return np.frombuffer(data, EDGE, offset=8)
