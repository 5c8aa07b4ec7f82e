"""Which parts of which documents go, by ranges of hashes over the files of all units.

Who keeps an equal part does not depend on what came first: a held-out document, if one has it (what it says is not trained on); else the one
of the source that the configuration names first, of these the one of the smallest hash; equal documents go by their place in the plan. All
others lose it; within the document that keeps it, it may come again. Documents that go for a near-duplicate have no say. Exact copies need
no such care: the one that stays comes before them in every order.

A partition reads its range of every file (ranged reads), sorts, and writes for every unit (ordinal, place) of what goes. Memory: about 150
bytes a part of the partition, of which there are PARTITION_PARTS on average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep import hash_sorted
from data_prep.paragraphs.parts import PART
from data_prep.records import UnitManifest
from data_prep.resolve import READ_THREADS, Heldout, duplicates_bytes, read_duplicates
from data_prep.units import Units
from pipeline.config.schema import RunConfig, StorageConfig
from pipeline.manifest import digest_of
from pipeline.storage import Storage, open_storage

PARTITION_PARTS = 4_000_000
GOING = np.dtype("<u8")  # ordinal << 32 | place


@dataclass(frozen=True)
class Corpus:
    """Of all units, in order of the plan: what every partition reads."""

    paths: tuple[str, ...]  # of files of parts; "" for a unit without
    owners: tuple[int, ...]  # number of its source, in the order in which the configuration names them
    heldout: tuple[tuple[int, tuple[int, ...]], ...]  # place of a unit, ordinals that are held out
    near: str | None  # path of the near-duplicates of all units


@dataclass(frozen=True)
class Range:
    """Leading hash bytes [low, high)."""

    low: int
    high: int
    output: str


def corpus_of(
    config: RunConfig, units: Units, tokenized: Sequence[UnitManifest], heldout: Mapping[str, Heldout], near: str | None
) -> Corpus:
    numbers = {source.name: number for number, source in enumerate(config.corpus.sources)}
    chosen = tuple(
        (place, tuple(ordinals))
        for place, (unit_id, source) in enumerate(zip(units.ids, units.sources))
        if (ordinals := heldout[source].chosen.get(unit_id))
    )
    paths = tuple(unit.paragraphs.path if unit.paragraphs else "" for unit in tokenized)
    return Corpus(paths, tuple(numbers[name] for name in units.sources), chosen, near)


def ranges(tokenized: Sequence[UnitManifest], corpus: Corpus, folder: str) -> list[Range]:
    """A power of two of equal ones. Files are named after what they were made from."""
    files = [unit.paragraphs for unit in tokenized]
    parts = sum(max(0, file.bytes - hash_sorted.HEAD.itemsize) for file in files if file) // PART.itemsize
    count = 1
    while count < 256 and parts > count * PARTITION_PARTS:
        count *= 2
    made_from = digest_of([[file.sha256 if file else "" for file in files], corpus.owners, corpus.heldout, corpus.near])
    edges = [256 * part // count for part in range(count + 1)]
    return [
        Range(low, high, f"{folder}/paragraphs-{made_from[:16]}-{low:02x}-{high:03x}.going")
        for low, high in zip(edges, edges[1:])
    ]


def find_going(storage_config: StorageConfig, corpus: Corpus, wanted: Range) -> str:
    """Write the range's file, as `resolve.duplicates_bytes` lays it out. Returns its path."""
    storage = open_storage(storage_config)
    if storage.exists(wanted.output):
        return wanted.output
    heldout = dict(corpus.heldout)

    def load(place: int) -> tuple[NDArray[np.void], NDArray[np.uint16]]:
        return _of_unit(storage, corpus, wanted, place, heldout.get(place, ()))

    with ThreadPoolExecutor(READ_THREADS) as pool:
        found = list(pool.map(load, range(len(corpus.paths))))
    records = np.concatenate([part for part, _ in found])
    rank = np.concatenate([rank for _, rank in found])
    unit = np.repeat(np.arange(len(found), dtype=np.uint32), [len(part) for part, _ in found])
    order = np.lexsort((records["number"], records["ordinal"], unit, records["document"], rank, records["hash"]))
    records, unit = records[order], unit[order]
    again = np.append(False, records["hash"][1:] == records["hash"][:-1])[: len(records)]
    first = np.maximum.accumulate(np.where(again, 0, np.arange(len(records)))) if len(records) else order
    goes = (unit != unit[first]) | (records["ordinal"] != records["ordinal"][first])
    unit = unit[goes]
    places = records["ordinal"][goes].astype(GOING) << np.uint64(32) | records["number"][goes].astype(GOING)
    arranged = np.lexsort((places, unit))
    edges = np.searchsorted(unit[arranged], np.arange(len(found) + 1))
    storage.write(wanted.output, duplicates_bytes(np.split(places[arranged], edges[1:-1]), GOING))
    return wanted.output


def _of_unit(
    storage: Storage, corpus: Corpus, wanted: Range, place: int, heldout: Sequence[int]
) -> tuple[NDArray[np.void], NDArray[np.uint16]]:
    """Records of a unit's range, and the rank of each one's document: 0 is held out."""
    path = corpus.paths[place]
    records = hash_sorted.read(storage, path, PART, wanted.low, wanted.high) if path else np.zeros(0, PART)
    if corpus.near is not None and len(records):
        near = read_duplicates(storage, corpus.near, place, len(corpus.paths))
        records = records[~np.isin(records["ordinal"], near)]
    rank = np.full(len(records), corpus.owners[place] + 1, np.uint16)
    rank[np.isin(records["ordinal"], heldout)] = 0
    return records, rank


def read_going(storage: Storage, paths: Sequence[str], place: int, units: int) -> NDArray[np.uint64]:
    """GOING of the unit with that place in the plan, ascending. Raises DamagedFile."""
    found = [read_duplicates(storage, path, place, units, GOING) for path in paths]
    return np.sort(np.concatenate([np.zeros(0, GOING), *found]))
