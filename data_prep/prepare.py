"""Raw files to a committed dataset: list, plan, tokenizer, tokenize units, resolve, pack units, gather rests, commit.

Every step writes objects named by what they were made from, and commits them by a conditional create; what is committed is
never done again. So the same call, after any crash, finishes the work with the same bytes, and several runs at once
converge. `dataset.json` comes last; its digest does not depend on where the storage is, nor on who did what when.

Raises ConfigError (one line, naming the key) before any work for a corpus, tokenizer or storage that cannot be.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from data_prep.attempts import forget_attempts, tokenize_guarded
from data_prep.listing import Listing, list_source
from data_prep.mapping import MapUnits, map_in_process
from data_prep.pack_unit import PackSettings, PackTask, layout, pack_unit
from data_prep.plan import FORMAT_VERSION, Unit, plan_source, unit_settings
from data_prep.quarantine_share import QuarantineShare
from data_prep.readers import is_json_lines, row_group_bytes
from data_prep.records import (
    PackManifest,
    Plan,
    PrepareProgress,
    Report,
    TailManifest,
    UnitManifest,
    lease_path,
    plan_path,
    shard_path,
    units_path,
)
from data_prep.resolve import READ_THREADS, Heldout, Partition, choose_heldout, find_duplicates, partitions_of
from data_prep.tail import TailTask, build_tail, tail_tasks
from data_prep.tokenize_unit import TokenizeSettings, open_input, token_dtype
from data_prep.tokenizer_stage import ensure_tokenizer, tokenizer_identity
from data_prep.units import Units
from pipeline.config.load import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.file_index import dataset_path, index_path, read_dataset, write_index
from pipeline.integrity import read_checked
from pipeline.lease import hold, say_waiting
from pipeline.manifest import (
    DatasetManifest,
    DocumentCounts,
    FileEntry,
    SourceManifest,
    TokenizerManifest,
    digest_of,
)
from pipeline.storage import Storage
from pipeline.tokenizer import Encoder

log = logging.getLogger(__name__)

LIBRARIES = ("pyarrow", "gigatoken", "tokenizers")  # whose versions decide bytes


def identity(config: RunConfig, storage: Storage) -> str:
    """Digest of the listing and of every setting that decides the dataset: known in seconds, without doing the work."""
    return _identity(config, _list(config))


def settings_digest(config: RunConfig) -> str:
    """Digest of every setting that decides the dataset, whatever files are in the corpus."""
    return _identity(config, {})


def prepare(
    config: RunConfig,
    storage: Storage,
    *,
    map_units: MapUnits = map_in_process,
    report: Report = lambda _progress: None,
) -> DatasetManifest:
    """The committed dataset of this configuration and corpus, in `storage`; returns at once if it exists.

    Raises Held if somebody else prepares it, and LeaseLost if somebody has taken over."""
    config = config.model_copy(update={"storage": storage.config})  # workers open it by their settings
    listings = _list(config)
    dataset_identity = _identity(config, listings)
    if storage.exists(dataset_path(dataset_identity)):
        return _checked(config, read_dataset(storage, dataset_identity))
    path, what = lease_path(dataset_identity), f"dataset {dataset_identity[:8]}"
    with hold(storage, path, what=what, waiting=say_waiting) as lease:
        return _prepare(config, storage, listings, dataset_identity, map_units, report, lease.check)


def _prepare(
    config: RunConfig,
    storage: Storage,
    listings: dict[str, Listing],
    dataset_identity: str,
    map_units: MapUnits,
    report: Report,
    check: Callable[[], None],
) -> DatasetManifest:
    """`check`: raises if somebody else has taken over, whose tasks would count this one's unfinished attempts as crashes."""
    plan = _plan(config, storage, listings, dataset_identity, report)
    for note in plan.tokenizer.notes:
        log.warning("tokenizer: %s", note)
    if any(source.conversations for source in config.corpus.sources):
        encoder = Encoder.stored(plan.tokenizer, storage)
        encoder.chat.marks(encoder)  # refuses a tokenizer without a chat template that says where answers are
    units = _read_units(storage, plan)
    roots = {name: listing.root for name, listing in listings.items()}
    tokenized = _tokenize(config, storage, roots, plan, units, map_units, report)
    heldout, packed = _resolve_and_pack(config, storage, plan, units, tokenized, map_units, report)
    tails = _tails(config, plan, units, packed, map_units, report)
    dataset = _dataset(config, storage, plan, units, tokenized, heldout, packed, tails)
    failed = sum(len(source.failed_units) for source in dataset.sources)
    documents, text_bytes = sum(pack.counts.docs_out for pack in packed), sum(pack.text_bytes for pack in packed)
    facts = (len(units), len(units), failed, documents, text_bytes, dataset.tokens, 0.0, len(units))
    report(PrepareProgress("packed", *facts, padding=dataset.padding))
    _checked(config, dataset)
    check()
    forget_attempts(storage, units.ids)
    storage.create(dataset_path(dataset_identity), dataset.to_json())
    storage.sweep("datasets")
    return read_dataset(storage, dataset_identity)


def _checked(config: RunConfig, dataset: DatasetManifest) -> DatasetManifest:
    """Raises ConfigError for more padding than the configuration allows: the packs stay, so another try is quick."""
    try:
        dataset.check_padding(config.data.max_padding)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return dataset


def _list(config: RunConfig) -> dict[str, Listing]:
    return {
        source.name: list_source(source, index, config.storage) for index, source in enumerate(config.corpus.sources)
    }


def _identity(config: RunConfig, listings: dict[str, Listing]) -> str:
    sources = {}
    for source in config.corpus.sources:
        settings = unit_settings(source, config.corpus, "")
        settings["drop_exact_duplicates"] = source.filters.drop_exact_duplicates
        sources[source.name] = {
            "settings": settings,
            "files": listings[source.name].digest if source.name in listings else "",
        }
    parts = {
        "format_version": FORMAT_VERSION,
        "sources": sources,
        "unit_bytes": config.corpus.unit_bytes,
        "tokenizer": tokenizer_identity(config),
        "layout": layout(config.data),
        "versions": _versions(),
    }
    if config.corpus.drop_duplicates_across_sources:  # then their order decides which of two copies stays
        parts["order_of_sources"] = [source.name for source in config.corpus.sources]
    return digest_of(parts)[:32]


def _versions() -> dict[str, str]:
    return {"format": str(FORMAT_VERSION), **{name: importlib.metadata.version(name) for name in LIBRARIES}}


# -- plan ------------------------------------------------------------------------------------------------------------


def _plan(
    config: RunConfig, storage: Storage, listings: dict[str, Listing], dataset_identity: str, report: Report
) -> Plan:
    """The plan that was committed for this identity, or a new one. Of concurrent planners the first one's holds."""
    path = plan_path(dataset_identity)
    if not storage.exists(path):
        report(PrepareProgress("tokenizer", 0, 1, 0, 0, 0, 0, 0.0))
        tokenizer = ensure_tokenizer(config, storage, listings)
        units = Units(_planned(config, listings, tokenizer, _known_units(storage)))
        data = units.to_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        entry = FileEntry(path=units_path(dataset_identity, sha256), bytes=len(data), sha256=sha256)
        storage.write(entry.path, data)
        plan = Plan(identity=dataset_identity, tokenizer=tokenizer, units=entry, count=len(units))
        storage.create(path, plan.to_json())
    return Plan.parse(storage.read(path), path)


def _planned(
    config: RunConfig, listings: dict[str, Listing], tokenizer: TokenizerManifest, known: Units
) -> Iterator[Unit]:
    for source in config.corpus.sources:
        settings = unit_settings(source, config.corpus, tokenizer.sha256)
        files, unit_bytes = listings[source.name], config.corpus.unit_bytes
        groups, lines = partial(_row_group_bytes, files.root, config), partial(_is_json_lines, files.root, config)
        yield from plan_source(source, files, unit_bytes, settings, known, groups, lines)


def _known_units(storage: Storage) -> Units:
    """Units of earlier plans here, larger plans first: a later version of a dataset contains the earlier ones."""
    heads = [entry.path for entry in storage.list("datasets/plans") if entry.path.endswith(".json")]
    plans = [Plan.parse(storage.read(path), path) for path in heads]
    seen: set[str] = set()

    def new() -> Iterator[Unit]:
        for plan in sorted(plans, key=lambda plan: (-plan.count, plan.identity)):
            for unit in _read_units(storage, plan):
                if unit.id not in seen:
                    seen.add(unit.id)
                    yield unit

    return Units(new())


def _read_units(storage: Storage, plan: Plan) -> Units:
    return Units.from_bytes(read_checked(storage, plan.units))


def _row_group_bytes(root: str, config: RunConfig, path: str) -> list[int] | None:
    with open_input(root, path, config.storage) as file:
        return row_group_bytes(file)


def _is_json_lines(root: str, config: RunConfig, path: str) -> bool:
    with open_input(root, path, config.storage) as file:
        return is_json_lines(path, file)


# -- units -----------------------------------------------------------------------------------------------------------


def _mapped(
    phase: str,
    function: Callable[[Any], Any],
    items: Sequence[Any],
    map_units: MapUnits,
    report: Report,
    measure: Callable[[Any], tuple[int, int, int, bool]],
    done: Sequence[Any] | None = None,
) -> list[Any]:
    """Results in the items' order, with progress. `done`: an item's result where it is known, else None.

    `measure`: documents, text bytes, tokens of a result, and whether it failed.
    """
    results = list(done or [None] * len(items))
    pending = [index for index, result in enumerate(results) if result is None]
    before = len(items) - len(pending)
    documents = text_bytes = tokens = 0
    failed = sum(measure(result)[3] for result in results if result is not None)
    start = time.monotonic()
    report(PrepareProgress(phase, before, len(items), failed, 0, 0, 0, 0.0, before))
    mapped = map_units(function, items if len(pending) == len(items) else [items[index] for index in pending])
    for count, (place, result) in enumerate(mapped, start=before + 1):
        results[pending[place]] = result
        more = measure(result)
        documents, text_bytes, tokens = documents + more[0], text_bytes + more[1], tokens + more[2]
        failed += more[3]
        seconds = time.monotonic() - start
        report(PrepareProgress(phase, count, len(items), failed, documents, text_bytes, tokens, seconds, before))
    assert all(result is not None for result in results), f"{phase}: units are missing from the results"
    return results


def _tokenize(
    config: RunConfig,
    storage: Storage,
    roots: dict[str, str],
    plan: Plan,
    units: Units,
    map_units: MapUnits,
    report: Report,
) -> list[UnitManifest]:
    settings = {}
    for source in config.corpus.sources:
        settings[source.name] = TokenizeSettings(
            storage=config.storage,
            root=roots[source.name],
            source=source,
            tokenizer=plan.tokenizer,
            heldout_fraction=config.corpus.heldout_fraction,
            heldout_max_documents=config.corpus.heldout_max_documents,
            max_document_bytes=config.corpus.max_document_bytes,
            keep_rejected=config.corpus.keep_rejected,
            unit_settings=unit_settings(source, config.corpus, plan.tokenizer.sha256),
            versions=_versions(),
        )

    quarantined = QuarantineShare(config.corpus.sources, config.corpus.max_quarantined_fraction)

    def measure(value: dict[str, Any]) -> tuple[int, int, int, bool]:
        quarantined.add(value)
        return value["counts"]["docs_in"], value["text_bytes"], value["tokens"], bool(value["failed"])

    done = _committed(storage, units)
    found = _mapped("tokenize", partial(_tokenize_unit, settings), units, map_units, report, measure, done)
    quarantined.end()
    return [UnitManifest.model_validate(value) for value in found]


def _committed(storage: Storage, units: Units) -> list[dict[str, Any] | None]:
    """The manifests of units that need no task any more: of 45,000 at 5.7 T tokens, hardly one is left after a crash."""
    there = {entry.path for entry in storage.list("datasets/units")}

    def load(unit_id: str) -> dict[str, Any] | None:
        path = shard_path("units", unit_id, ".json")
        return _without_slices(UnitManifest.parse(storage.read(path), path)) if path in there else None

    with ThreadPoolExecutor(READ_THREADS) as pool:
        return list(pool.map(load, units.ids))


def _tokenize_unit(settings: dict[str, TokenizeSettings], unit: Unit) -> dict[str, Any]:
    return _without_slices(tokenize_guarded(settings[unit.source], unit))


def _without_slices(manifest: UnitManifest) -> dict[str, Any]:
    """What later steps need of a unit: the slices of a million files would be a million dictionaries."""
    return manifest.model_copy(update={"slices": (), "settings": {}}).model_dump(mode="json")


def _resolve_and_pack(
    config: RunConfig,
    storage: Storage,
    plan: Plan,
    units: Units,
    tokenized: list[UnitManifest],
    map_units: MapUnits,
    report: Report,
) -> tuple[dict[str, Heldout], list[PackManifest]]:
    folder = _resolved(plan)
    heldout: dict[str, Heldout] = {}
    partitions: dict[str, list[Any]] = {}
    places: dict[str, list[int]] = {}  # of a source's units in the plan
    for source in config.corpus.sources:
        mine = places[source.name] = units.of(source.name)
        manifests, generations = [tokenized[place] for place in mine], [units.generations[place] for place in mine]
        heldout[source.name] = choose_heldout(
            storage, source.name, manifests, generations, config.corpus.heldout_max_documents, plan.tokenizer
        )
        dedup = source.filters.drop_exact_duplicates
        partitions[source.name] = partitions_of(source.name, manifests, folder) if dedup else []
    across: list[Partition] = []
    if config.corpus.drop_duplicates_across_sources:
        numbers = {source.name: number for number, source in enumerate(config.corpus.sources)}
        across = partitions_of("_across", tokenized, folder, [numbers[name] for name in units.sources])
    hashes = b"".join(sorted(frozenset().union(*(chosen.hashes for chosen in heldout.values()))))
    entry = FileEntry(path=f"{folder}/heldout.hashes", bytes=len(hashes), sha256=hashlib.sha256(hashes).hexdigest())
    storage.write(entry.path, hashes)
    settings = _pack_settings(config, plan, entry)
    every = [partition for found in partitions.values() for partition in found] + across
    _mapped("resolve", partial(find_duplicates, config.storage), every, map_units, report, lambda _: (0, 0, 0, False))

    tasks: list[PackTask] = []
    for place, (unit_id, owner) in enumerate(zip(units.ids, units.sources)):
        mine = places[owner]
        tasks.append(
            PackTask(
                unit=shard_path("units", unit_id, ".json"),
                place=place - mine[0],
                units=len(mine),
                heldout=tuple(heldout[owner].chosen.get(unit_id, ())),
                duplicates=tuple(partition.output for partition in partitions[owner]),
                place_in_all=place,
                units_in_all=len(units),
                across=tuple(partition.output for partition in across),
            )
        )

    def measure(value: dict[str, Any]) -> tuple[int, int, int, bool]:
        return value["counts"]["docs_out"], value["text_bytes"], _tokens(value["packed"]), False

    found = _mapped("pack", partial(_pack_unit, settings), tasks, map_units, report, measure)
    return heldout, [PackManifest.model_validate(value) for value in found]


def _pack_unit(settings: PackSettings, task: PackTask) -> dict[str, Any]:
    return pack_unit(settings, task).model_dump(mode="json")


def _resolved(plan: Plan) -> str:
    return f"datasets/{plan.identity}/resolved"


def _pack_settings(config: RunConfig, plan: Plan, heldout_hashes: FileEntry | None = None) -> PackSettings:
    return PackSettings(config.storage, config.data, plan.tokenizer, heldout_hashes, config.corpus.keep_rejected)


def _tails(
    config: RunConfig, plan: Plan, units: Units, packed: list[PackManifest], map_units: MapUnits, report: Report
) -> dict[str, list[TailManifest]]:
    tasks: list[TailTask] = []
    owners: list[str] = []
    for source in config.corpus.sources:
        mine = units.of(source.name)
        found = tail_tasks([packed[place] for place in mine], [units.generations[place] for place in mine])
        tasks += found
        owners += [source.name] * len(found)

    def measure(value: dict[str, Any]) -> tuple[int, int, int, bool]:
        return 0, 0, _tokens(value["packed"]), False

    built = _mapped("tail", partial(_build_tail, _pack_settings(config, plan)), tasks, map_units, report, measure)
    tails: dict[str, list[TailManifest]] = {source.name: [] for source in config.corpus.sources}
    for owner, value in zip(owners, built):
        tails[owner].append(TailManifest.model_validate(value))
    return tails


def _build_tail(settings: PackSettings, task: TailTask) -> dict[str, Any]:
    return build_tail(settings, task).model_dump(mode="json")


def _tokens(files: list[dict[str, Any]]) -> int:
    return sum(file["tokens"] for file in files)


# -- commit ----------------------------------------------------------------------------------------------------------


def _dataset(
    config: RunConfig,
    storage: Storage,
    plan: Plan,
    units: Units,
    tokenized: list[UnitManifest],
    heldout: dict[str, Heldout],
    packed: list[PackManifest],
    tails: dict[str, list[TailManifest]],
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
            )
        )
    records = [pack.digest for pack in packed] + [tail.digest for found in tails.values() for tail in found]
    return DatasetManifest(
        identity=plan.identity,
        tokenizer=plan.tokenizer,
        token_dtype=token_dtype(plan.tokenizer.vocab_size).name,
        sequence_length=config.data.sequence_length,
        rows_per_group=config.data.rows_per_group,
        sources=tuple(sources),
        files=write_index(storage, index_path(plan.identity), indexed, records),
        versions=_versions(),
    )


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
