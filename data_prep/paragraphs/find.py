"""Which parts of which documents go, by ranges of hashes over the files of all units.

Who keeps an equal part does not depend on what came first: a held-out document, if one has it (what it says is not trained on); else one that
fits into a row, where documents are not cut, before one that does not; of these the one of the source that the configuration names first, of
these the one of the smallest hash; equal documents go by their place in the plan. All others lose it; within the document that keeps it, it may come again. Documents that go for a near-duplicate have no say. Exact copies need
no such care: the one that stays comes before them in every order.

A partition reads its range of every file twice (ranged reads): first to find of every hash the document that keeps it, then to write for every
unit (ordinal, place) of what goes. Memory: about 100 bytes a hash of the partition, of which there are PARTITION_PARTS on average, however
many documents have the same one, and the records of READ_THREADS units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from data_prep import hash_sorted
from data_prep.paragraphs.parts import PART
from data_prep.records import UnitManifest
from data_prep.resolve import LONG, READ_THREADS, Heldout, read_duplicates, read_part, write_duplicates
from data_prep.units import Units
from data_prep.writer import put
from pipeline.config.schema import RunConfig, StorageConfig
from pipeline.manifest import digest_of
from pipeline.storage import Storage, open_storage

PARTITION_PARTS = 4_000_000
GOING = np.dtype("<u8")  # ordinal << 32 | place
KEEPER = np.dtype([("hash", "<u8"), ("document", "<u8"), ("unit", "<u4"), ("ordinal", "<u4"), ("rank", "<u2")])


@dataclass(frozen=True)
class Corpus:
    """Of all units, in order of the plan: what every partition reads."""

    paths: tuple[str, ...]  # of files of parts; "" for a unit without
    owners: tuple[int, ...]  # number of its source, in the order in which the configuration names them
    heldout: tuple[tuple[int, tuple[int, ...]], ...]  # place of a unit, ordinals that are held out
    near: str | None  # path of the near-duplicates of all units
    long: str = ""  # path of documents that fit into no row; "": all do, or are cut


@dataclass(frozen=True)
class Range:
    """Leading hash bytes [low, high)."""

    low: int
    high: int
    output: str


def corpus_of(
    config: RunConfig,
    units: Units,
    tokenized: Sequence[UnitManifest],
    heldout: Mapping[str, Heldout],
    near: str | None,
    long: str = "",
) -> Corpus:
    numbers = {source.name: number for number, source in enumerate(config.corpus.sources)}
    chosen = tuple(
        (place, tuple(ordinals))
        for place, (unit_id, source) in enumerate(zip(units.ids, units.sources))
        if (ordinals := heldout[source].chosen.get(unit_id))
    )
    paths = tuple(unit.paragraphs.path if unit.paragraphs else "" for unit in tokenized)
    return Corpus(paths, tuple(numbers[name] for name in units.sources), chosen, near, long)


def ranges(tokenized: Sequence[UnitManifest], corpus: Corpus, folder: str) -> list[Range]:
    """A power of two of equal ones. Files are named after what they were made from."""
    files = [unit.paragraphs for unit in tokenized]
    parts = sum(max(0, file.bytes - hash_sorted.HEAD.itemsize) for file in files if file) // PART.itemsize
    count = 1
    while count < 256 and parts > count * PARTITION_PARTS:
        count *= 2
    named = [[file.sha256 if file else "" for file in files], corpus.owners, corpus.heldout, corpus.near]
    made_from = digest_of([*named, *([corpus.long] if corpus.long else [])])
    edges = [256 * part // count for part in range(count + 1)]
    return [
        Range(low, high, f"{folder}/paragraphs-{made_from[:16]}-{low:02x}-{high:03x}.going")
        for low, high in zip(edges, edges[1:])
    ]


def find_going(storage_config: StorageConfig, corpus: Corpus, wanted: Range) -> str:
    """Write the range's file, as `resolve.duplicates_bytes` lays one out. Returns its path."""
    storage = open_storage(storage_config)
    if not storage.exists(wanted.output):
        keepers = _keepers(storage, corpus, wanted)
        with TemporaryDirectory(prefix="paragraphs-") as folder:
            path = Path(folder) / "going"
            with path.open("wb") as file:
                write_duplicates(file, len(corpus.paths), _going(storage, corpus, wanted, keepers), GOING)
            put(storage, path, wanted.output)
    return wanted.output


def _keepers(storage: Storage, corpus: Corpus, wanted: Range) -> NDArray[np.void]:
    """KEEPER of every hash of the range, ascending by hash."""
    found = np.zeros(0, KEEPER)
    waiting = [found]
    for place, records, rank in _units(storage, corpus, wanted):
        mine = np.empty(len(records), KEEPER)
        mine["hash"], mine["rank"], mine["document"] = records["hash"], rank, records["document"]
        mine["unit"], mine["ordinal"] = place, records["ordinal"]
        waiting.append(mine)
        if sum(map(len, waiting)) > len(found) + PARTITION_PARTS:
            found = _best(np.concatenate(waiting))
            waiting = [found]
    return _best(np.concatenate(waiting))


def _best(keepers: NDArray[np.void]) -> NDArray[np.void]:
    """The first of each hash."""
    names = ("ordinal", "unit", "document", "rank", "hash")
    keepers = keepers[np.lexsort([keepers[name] for name in names])]
    return keepers[np.append(True, keepers["hash"][1:] != keepers["hash"][:-1])[: len(keepers)]]


def _going(storage: Storage, corpus: Corpus, wanted: Range, keepers: NDArray[np.void]) -> Iterator[NDArray[np.uint64]]:
    """Of every unit GOING of what other documents keep, ascending."""
    for place, records, _ in _units(storage, corpus, wanted):
        mine = keepers[np.searchsorted(keepers["hash"], records["hash"])]
        records = records[(mine["unit"] != place) | (mine["ordinal"] != records["ordinal"])]
        yield np.sort(records["ordinal"].astype(GOING) << np.uint64(32) | records["number"].astype(GOING))


def _units(
    storage: Storage, corpus: Corpus, wanted: Range
) -> Iterator[tuple[int, NDArray[np.void], NDArray[np.uint16]]]:
    """Place, records and ranks of every unit, READ_THREADS of them at once in memory."""
    heldout = dict(corpus.heldout)

    def load(place: int) -> tuple[int, NDArray[np.void], NDArray[np.uint16]]:
        return place, *_of_unit(storage, corpus, wanted, place, heldout.get(place, ()))

    with ThreadPoolExecutor(READ_THREADS) as pool:
        for first in range(0, len(corpus.paths), READ_THREADS):
            yield from pool.map(load, range(first, min(first + READ_THREADS, len(corpus.paths))))


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
    if corpus.long and len(records):
        rank[np.isin(records["ordinal"], read_duplicates(storage, corpus.long, place, len(corpus.paths)))] = LONG
    rank[np.isin(records["ordinal"], heldout)] = 0
    return records, rank


def read_going(storage: Storage, paths: Sequence[str], place: int, units: int) -> NDArray[np.uint64]:
    """GOING of the unit with that place in the plan, ascending. Raises DamagedFile."""
    found = [read_part(storage, path, place, units, GOING) for path in paths]
    return np.sort(np.concatenate([np.zeros(0, GOING), *found]))
