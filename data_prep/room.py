"""What a dataset wants of a disk: text that becomes rows, less what an earlier try or an earlier version of the corpus has done."""

from __future__ import annotations

from collections.abc import Mapping

from data_prep.dataset_plan import known_units, planned_units
from data_prep.listing import Listing
from data_prep.records import PackManifest
from data_prep.tokenizer_stage import find_tokenizer
from pipeline.config.schema import RunConfig
from pipeline.integrity import read_record
from pipeline.storage import Storage


def text_bytes(config: RunConfig, listings: Mapping[str, Listing]) -> int:
    """Bytes of the files of all sources. The languages of one source are in the same files, of which each document is in one of them."""
    sizes = {}
    for source in config.corpus.sources:
        files, rule = listings[source.name], source.rules.languages
        split = rule is not None and bool(rule.keep)
        sizes[(files.root, files.digest) if split else source.name] = files.bytes
    return sum(sizes.values())


def written_share(config: RunConfig, storage: Storage, listings: dict[str, Listing]) -> float:
    """Of documents and packed rows of this length together how much is there already, by the text of their units."""
    tokenizer = find_tokenizer(config, storage, listings)
    if tokenizer is None:
        return 0.0
    sizes = {unit.id: unit.size for unit in planned_units(config, listings, tokenizer, known_units(storage))}
    tokenized = [entry.path.rpartition("/")[2].removesuffix(".json") for entry in storage.list("datasets/units")]
    records = (read_record(storage, entry.path, PackManifest) for entry in storage.list("datasets/packs"))
    packed = {
        pack.unit
        for pack in records
        if pack is not None and pack.sequence_length in (None, config.data.sequence_length)
    }
    done = sum(sizes.get(unit, 0) for unit in [*tokenized, *packed])
    return done / (2 * sum(sizes.values()))
