"""The manifest of a dataset version: what was made of every source, and the index of its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from data_prep.contamination.of_dataset import contamination_of
from data_prep.identity import versions
from data_prep.records import PackManifest, Plan, TailManifest, UnitManifest
from data_prep.resolve import Heldout
from data_prep.tokenize_unit import token_dtype
from data_prep.units import Units
from pipeline.config.schema import RunConfig
from pipeline.file_index import index_path, write_index
from pipeline.histogram import together
from pipeline.manifest import DatasetManifest, DocumentCounts, FileEntry, NearDuplicatesFound, SourceManifest
from pipeline.storage import Storage


def dataset_manifest(
    config: RunConfig,
    storage: Storage,
    plan: Plan,
    units: Units,
    tokenized: list[UnitManifest],
    heldout: dict[str, Heldout],
    near: NearDuplicatesFound | None,
    packed: list[PackManifest],
    tails: dict[str, list[TailManifest]],
    questions: FileEntry | None = None,
) -> DatasetManifest:
    sources = []
    indexed: list[dict[str, Sequence[FileEntry]]] = []
    for source in config.corpus.sources:
        mine = [(tokenized[place], packed[place]) for place in units.of(source.name)]
        chosen = heldout[source.name].file
        counts = total_counts([pack.counts for _, pack in mine])
        assert counts.balanced(), f"{source.name}: documents were lost: {counts}"
        assert counts.heldout == (chosen.documents if chosen else 0), f"{source.name}: held-out documents were lost"
        files = [file for _, pack in mine for file in pack.packed]
        files += [file for tail in tails[source.name] for file in tail.packed]
        indexed.append(
            {
                "packed": files,
                "documents": [unit.documents for unit, _ in mine if unit.documents],
                "quarantine": [unit.quarantine for unit, _ in mine if unit.quarantine],
                "rejected": [record.rejected for pair in mine for record in pair if record.rejected],
            }
        )
        sources.append(
            SourceManifest(
                name=source.name,
                heldout=(chosen,) if chosen else (),
                failed_units=tuple(unit.id for unit, _ in mine if unit.failed),
                counts=counts,
                rows=sum(file.rows for file in files),
                tokens=sum(file.tokens for file in files),
                text_bytes=sum(pack.text_bytes for _, pack in mine),
                dropped_rows=sum(tail.dropped_rows for tail in tails[source.name]),
                changes=_summed(record.changes for pair in mine for record in pair),
                languages=_summed(unit.languages for unit, _ in mine),
                contaminated=_summed(unit.contaminated for unit, _ in mine),
                scores=together(unit.scores for unit, _ in mine),
            )
        )
    records = [pack.digest for pack in packed] + [tail.digest for found in tails.values() for tail in found]
    looked_for, contamination = config.corpus.decontamination, None
    if looked_for is not None:
        assert questions is not None
        contamination = contamination_of(storage, looked_for, questions, tokenized, f"datasets/{plan.identity}")
    return DatasetManifest(
        identity=plan.identity,
        tokenizer=plan.tokenizer,
        token_dtype=token_dtype(plan.tokenizer.vocab_size).name,
        sequence_length=config.data.sequence_length,
        rows_per_group=config.data.rows_per_group,
        sources=tuple(sources),
        files=write_index(storage, index_path(plan.identity), indexed, records),
        versions=versions(),
        near_duplicates=near,
        contamination=contamination,
    )


def _summed(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(sorted(total.items()))


def total_counts(parts: Sequence[DocumentCounts]) -> DocumentCounts:
    filtered: Counter[str] = Counter()
    quarantined: Counter[str] = Counter()
    for part in parts:
        filtered.update(part.filtered)
        quarantined.update(part.quarantined)
    return DocumentCounts(
        docs_in=sum(part.docs_in for part in parts),
        docs_out=sum(part.docs_out for part in parts),
        heldout=sum(part.heldout for part in parts),
        filtered=dict(sorted(filtered.items())),
        quarantined=dict(sorted(quarantined.items())),
    )
