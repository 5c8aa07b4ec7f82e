"""The near-duplicates of a dataset version: bands by ranges of hashes as Ray Data tasks, then one task for the clusters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from data_prep.near.bands import band_partitions, corpus_of, find_edges
from data_prep.near.components import Components, find_components
from data_prep.records import UnitManifest
from data_prep.resolve import Heldout
from data_prep.units import Units
from pipeline.config.schema import RunConfig
from pipeline.manifest import NearDuplicatesFound, digest_of

Mapped = Callable[[str, Callable[[Any], Any], Sequence[Any]], list[Any]]
"""(phase, function, items) -> results in the items' order."""


def find_near_duplicates(
    config: RunConfig,
    units: Units,
    tokenized: Sequence[UnitManifest],
    heldout: Mapping[str, Heldout],
    long: str,
    folder: str,
    mapped: Mapped,
) -> NearDuplicatesFound:
    """`corpus.near_duplicates` must be set. `tokenized`: of the units, in order. `long`: path of `find_long_documents`."""
    settings = config.corpus.near_duplicates
    assert settings is not None
    numbers = {source.name: number for number, source in enumerate(config.corpus.sources)}
    corpus = corpus_of(tokenized, [numbers[name] for name in units.sources])
    partitions = band_partitions(tokenized, settings, folder)
    edges = mapped("bands", partial(find_edges, config.storage, corpus), partitions)
    chosen = tuple(
        (place, tuple(ordinals))
        for place, (unit_id, source) in enumerate(zip(units.ids, units.sources))
        if (ordinals := heldout[source].chosen.get(unit_id))
    )
    bands = [unit.bands.sha256 if unit.bands else "" for unit in tokenized]
    made_from = digest_of([edges, bands, corpus.owners, chosen, *([long] if long else [])])
    task = Components(tuple(edges), chosen, f"{folder}/near-{made_from[:16]}", long)
    (found,) = mapped("clusters", partial(_find_components, config, corpus), [task])
    return NearDuplicatesFound.model_validate(found)


def _find_components(config: RunConfig, corpus: Any, task: Components) -> dict[str, Any]:
    return find_components(config.storage, corpus, task).model_dump(mode="json")
