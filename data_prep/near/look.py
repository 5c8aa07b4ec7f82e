"""What clusters of near-duplicates there are, for people: the largest ones, with who stays and who goes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq

from data_prep.dataset_plan import read_units
from data_prep.near.bands import EDGE
from data_prep.records import Plan, UnitManifest, plan_path, shard_path
from pipeline.integrity import open_checked, read_checked
from pipeline.manifest import DatasetManifest
from pipeline.storage import Storage

CLUSTERS, MEMBERS = 20, 5  # shown, and documents of each that are left out


def cluster_lines(dataset: DatasetManifest, storage: Storage) -> Iterator[str]:
    """Raises DamagedFile."""
    near = dataset.near_duplicates
    if near is None:
        yield "no near-duplicates were looked for: set corpus.near_duplicates ({} has the usual numbers) and prepare again"
        return
    pairs = np.frombuffer(read_checked(storage, near.clusters), EDGE)
    pairs = pairs[np.lexsort((pairs["other"], pairs["first"]))]
    documents = sum(source.counts.docs_in for source in dataset.sources)
    yield f"{near.count:,} clusters; {near.dropped:,} of {documents:,} documents go, copies among them"
    if not len(pairs):
        return
    first = np.flatnonzero(np.append(True, pairs["first"][1:] != pairs["first"][:-1]))
    sizes = np.diff(np.append(first, len(pairs))) + 1
    edges = [2, 3, 5, 10, 100, 1000, 1 << 62]
    for low, high in pairwise(edges):
        if found := int(((sizes >= low) & (sizes < high)).sum()):
            name = (
                f"{low:,} documents"
                if high == low + 1
                else f"{low:,} and more"
                if high == edges[-1]
                else f"{low:,} to {high - 1:,}"
            )
            yield f"  {found:,} of {name}"
    names = _Names(dataset, storage)
    for place in np.lexsort((first, -sizes))[:CLUSTERS]:
        members = pairs[first[place] : first[place] + sizes[place] - 1]
        yield f"{sizes[place]:,} documents; {names.of(int(members['first'][0]))} stays, without it"
        for number in members["other"][:MEMBERS].tolist():
            yield f"    {names.of(number)}"
        if len(members) > MEMBERS:
            yield f"    and {len(members) - MEMBERS:,} more"


class _Names:
    """Source and id of a document by its number over all units."""

    def __init__(self, dataset: DatasetManifest, storage: Storage) -> None:
        self._storage = storage
        path = plan_path(dataset.identity)
        self._units = read_units(storage, Plan.parse(storage.read(path), path))
        paths = [shard_path("units", unit_id, ".json") for unit_id in self._units.ids]
        self._manifests = [UnitManifest.parse(storage.read(path), path) for path in paths]
        self._bases = np.concatenate([[0], np.cumsum([unit.counts.docs_out for unit in self._manifests])])
        self._ids: dict[int, list[str]] = {}

    def of(self, number: int) -> str:
        place = int(np.searchsorted(self._bases, number, side="right")) - 1
        unit = self._manifests[place]
        if place not in self._ids:
            assert unit.documents is not None
            with open_checked(self._storage, unit.documents) as file:
                self._ids[place] = pq.ParquetFile(file).read(["doc_id"])["doc_id"].to_pylist()
        return f"{unit.source} {self._ids[place][number - int(self._bases[place])]}"
