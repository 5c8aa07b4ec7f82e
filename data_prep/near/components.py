"""Connected components of documents with equal bands, and the one document of each that is kept.

Who is kept does not depend on what came first: a held-out document, if there is one in the cluster (what resembles it is not trained
on); else one that fits into a row, where documents are not cut, before one that does not; of these the one of the source that the
configuration names first, of these the longest, of these that of the smallest hash; equal documents go by their place in the plan, as exact
duplicates do.

Union-find over all documents: an array of parents that the edges stream through, file by file, hooked onto the smaller root until
nothing changes. Memory: 15 bytes a document of the corpus at its peak (1.5 GB for 100 million, measured), 26 a cluster, and one file of edges or
one unit's documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.near.bands import EDGE, Corpus, read_edges
from data_prep.near.file import read_documents
from data_prep.resolve import LONG, duplicates_bytes, read_all_duplicates
from data_prep.writer import put
from pipeline.config.schema import StorageConfig
from pipeline.manifest import NearDuplicatesFound
from pipeline.storage import Storage, open_storage

Numbers = NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Components:
    """A task: all edges of a corpus."""

    edges: tuple[str, ...]  # paths
    heldout: tuple[tuple[int, tuple[int, ...]], ...]  # place of a unit, ordinals that are held out
    output: str  # path without ending
    long: str = ""  # path of documents that fit into no row; "": all do, or are cut


def find_components(storage_config: StorageConfig, corpus: Corpus, task: Components) -> NearDuplicatesFound:
    """The committed record; at once if it is there already."""
    storage = open_storage(storage_config)
    done = storage.read_or_none(f"{task.output}.json")
    if done is not None:
        return NearDuplicatesFound.parse(done, f"{task.output}.json")
    parent, member = _united(storage, corpus, task.edges)
    cluster = np.cumsum(member & (parent == np.arange(len(parent), dtype=parent.dtype)), dtype=parent.dtype)
    count = int(cluster[-1]) if len(cluster) else 0
    kept = _kept(storage, corpus, task, parent, member, cluster, count)
    with TemporaryDirectory(prefix="near-") as folder:
        found = _write(storage, corpus, task, parent, member, cluster, kept, Path(folder))
    storage.create(f"{task.output}.json", found.to_json())
    return found


def _united(storage: Storage, corpus: Corpus, edges: tuple[str, ...]) -> tuple[Numbers, NDArray[np.bool_]]:
    """Of every document the smallest number of its component, and whether it is in one at all."""
    documents = int(corpus.bases[-1])
    parent: Numbers = np.arange(documents, dtype=np.uint32 if documents < 1 << 32 else np.uint64)
    member = np.zeros(documents, bool)
    for path in edges:
        found = read_edges(storage, path)
        member[found["first"]] = member[found["other"]] = True
        unite(parent, found["first"].astype(parent.dtype), found["other"].astype(parent.dtype))
    places = np.flatnonzero(parent != np.arange(documents, dtype=parent.dtype))
    parent[places] = root(parent, places.astype(parent.dtype))
    return parent, member


def unite(parent: Numbers, first: Numbers, other: Numbers) -> None:
    """Every larger root is hooked onto the smallest that an edge joins it to; edges that still join two roots go round again."""
    while len(first):
        first, other = root(parent, first), root(parent, other)
        apart = first != other
        low, high = np.minimum(first, other)[apart], np.maximum(first, other)[apart]
        np.minimum.at(parent, high, low)
        first, other = low, high


def root(parent: Numbers, numbers: Numbers) -> Numbers:
    """The root of each, to which it then points."""
    found = parent[numbers]
    while not np.array_equal(above := parent[found], found):
        found = above
    parent[numbers] = found
    return found


def _kept(
    storage: Storage,
    corpus: Corpus,
    task: Components,
    parent: Numbers,
    member: NDArray[np.bool_],
    cluster: Numbers,
    count: int,
) -> Numbers:
    """The number of the document of each cluster that is kept."""
    heldout = dict(task.heldout)
    best: dict[str, NDArray[Any]] = {
        "rank": np.full(count, 0xFFFF, np.uint16),
        "short": np.zeros(count, np.uint64),  # the complement of its size
        "hash": np.zeros(count, np.uint64),
        "number": np.zeros(count, parent.dtype),
    }
    long = read_all_duplicates(storage, task.long, len(corpus.paths)) if task.long else None
    for place, (path, owner) in enumerate(zip(corpus.paths, corpus.owners)):
        base, end = (int(corpus.bases[place + step]) for step in (0, 1))
        ordinals = np.flatnonzero(member[base:end])
        if not len(ordinals):
            continue
        documents = read_documents(storage, path)[ordinals]
        rank = np.full(len(ordinals), owner + 1, np.uint16)
        if long is not None:
            rank[np.isin(ordinals, long(place))] = LONG
        rank[np.isin(ordinals, heldout.get(place, ()))] = 0
        mine: dict[str, NDArray[Any]] = {
            "rank": rank,
            "short": ~documents["bytes"].astype(np.uint64),
            "hash": documents["hash"].astype(np.uint64),
            "number": (ordinals + base).astype(parent.dtype),
        }
        of = cluster[parent[mine["number"]]] - 1
        order = np.lexsort((mine["number"], mine["hash"], mine["short"], mine["rank"], of))
        order = order[np.append(True, of[order][1:] != of[order][:-1])]  # the unit's best of each cluster
        of = of[order]
        better, equal = np.zeros(len(of), bool), np.ones(len(of), bool)
        for key, values in mine.items():
            better |= equal & (values[order] < best[key][of])
            equal &= values[order] == best[key][of]
        for key, values in mine.items():
            best[key][of[better]] = values[order[better]]
    return best["number"]


def _write(
    storage: Storage,
    corpus: Corpus,
    task: Components,
    parent: Numbers,
    member: NDArray[np.bool_],
    cluster: Numbers,
    kept: Numbers,
    folder: Path,
) -> NearDuplicatesFound:
    heldout, dropped = dict(task.heldout), list[NDArray[np.uint32]]()
    with (folder / "clusters").open("wb") as file:
        for place, (base, end) in enumerate(zip(corpus.bases, corpus.bases[1:])):
            ordinals = np.flatnonzero(member[base:end])
            stays = kept[cluster[parent[ordinals + base]] - 1]
            gone = (stays != ordinals + base) & ~np.isin(ordinals, heldout.get(place, ()))
            dropped.append(ordinals[gone].astype("<u4"))
            pairs = np.empty(int(gone.sum()), EDGE)
            pairs["first"], pairs["other"] = stays[gone], ordinals[gone] + base
            file.write(pairs.tobytes())
    (folder / "duplicates").write_bytes(duplicates_bytes(dropped))
    return NearDuplicatesFound(
        duplicates=put(storage, folder / "duplicates", f"{task.output}.duplicates"),
        clusters=put(storage, folder / "clusters", f"{task.output}.clusters"),
        count=len(kept),
        dropped=sum(map(len, dropped)),
    )
