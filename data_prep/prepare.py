"""Raw files to a committed dataset: list, plan, tokenizer, tokenize units, resolve, pack units, gather rests, commit.

Every step writes objects named by what they were made from, and commits them by a conditional create; what is committed is
never done again. So the same call, after any crash, finishes the work with the same bytes, and several runs at once
converge. `dataset.json` comes last; its digest does not depend on where the storage is, nor on who did what when.

Raises ConfigError (one line, naming the key) before any work for a corpus, tokenizer or storage that cannot be.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from data_prep.attempts import forget_attempts, tokenize_guarded
from data_prep.contamination.questions import find_questions
from data_prep.dataset import dataset_manifest
from data_prep.dataset_plan import plan_dataset, read_units
from data_prep.dropped_share import DroppedShare
from data_prep.identity import identity, list_corpus, versions
from data_prep.listing import Listing
from data_prep.long_documents import find_long_documents
from data_prep.mapping import MapUnits, map_in_process
from data_prep.near.find import find_near_duplicates
from data_prep.pack_unit import PackSettings, PackTask, pack_unit
from data_prep.paragraphs.find import corpus_of, find_going, ranges
from data_prep.plan import unit_settings
from data_prep.quarantine_share import QuarantineShare
from data_prep.records import (
    PackManifest,
    Plan,
    PrepareProgress,
    Report,
    TailManifest,
    UnitManifest,
    lease_path,
    shard_path,
)
from data_prep.resolve import READ_THREADS, Heldout, Indexes, Partition, choose_heldout, find_duplicates, partitions_of
from data_prep.rules.check import check_classifiers, check_rules
from data_prep.rules.classifier import Call, in_process
from data_prep.tail import TailTask, build_tail, tail_tasks
from data_prep.tokenize_unit import TokenizeSettings
from data_prep.units import Units, unpacked
from pipeline.config.load import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.file_index import dataset_path, read_dataset
from pipeline.lease import hold, say_waiting
from pipeline.manifest import DatasetManifest, FileEntry, NearDuplicatesFound
from pipeline.storage import Storage
from pipeline.tokenizer import Encoder

log = logging.getLogger(__name__)


def prepare(
    config: RunConfig,
    storage: Storage,
    *,
    listings: dict[str, Listing] | None = None,
    map_units: MapUnits = map_in_process,
    classify: Call = in_process,
    report: Report = lambda _progress: None,
) -> DatasetManifest:
    """The committed dataset of this configuration and corpus, in `storage`; returns at once if it exists.

    `listings`: those of `list_corpus`, by whoever has them already. `classify`: where classifiers run. Raises Held if somebody else prepares it, and LeaseLost if
    somebody has taken over.
    """
    config = config.model_copy(update={"storage": storage.config})  # workers open it by their settings
    listings = listings or list_corpus(config)
    dataset_identity = identity(config, listings)
    if storage.exists(dataset_path(dataset_identity)):
        return _checked(config, read_dataset(storage, dataset_identity))
    check_rules(config.corpus)
    check_classifiers(config.corpus)
    path, what = lease_path(dataset_identity), f"dataset {dataset_identity[:8]}"
    with hold(storage, path, what=what, waiting=say_waiting) as lease:
        return _prepare(config, storage, listings, dataset_identity, map_units, classify, report, lease.check)


def _prepare(
    config: RunConfig,
    storage: Storage,
    listings: dict[str, Listing],
    dataset_identity: str,
    map_units: MapUnits,
    classify: Call,
    report: Report,
    check: Callable[[], None],
) -> DatasetManifest:
    """`check`: raises if somebody else has taken over, whose tasks would count this one's unfinished attempts as crashes."""
    questions = find_questions(storage, config.corpus.decontamination)
    plan = plan_dataset(config, storage, listings, dataset_identity, report)
    for note in plan.tokenizer.notes:
        log.warning("tokenizer: %s", note)
    if any(source.conversations for source in config.corpus.sources):
        encoder = Encoder.stored(plan.tokenizer, storage)
        encoder.chat.marks(encoder)  # refuses a tokenizer without a chat template that says where answers are
    units = read_units(storage, plan)
    roots = {name: listing.root for name, listing in listings.items()}
    tokenized = _tokenize(config, storage, roots, plan, units, questions, map_units, classify, report)
    heldout, near, packed = _resolve_and_pack(config, storage, plan, units, tokenized, map_units, report)
    tails = _tails(config, plan, units, packed, map_units, report)
    dataset = dataset_manifest(config, storage, plan, units, tokenized, heldout, near, packed, tails, questions)
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
    questions: FileEntry | None,
    map_units: MapUnits,
    classify: Call,
    report: Report,
) -> list[UnitManifest]:
    settings = {}
    for index, source in enumerate(config.corpus.sources):
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
            near_duplicates=config.corpus.near_duplicates,
            duplicate_paragraphs=config.corpus.duplicate_paragraphs,
            decontamination=config.corpus.decontamination,
            questions=questions,
            versions=versions(),
            where=f"corpus.sources[{index}]",
            classify=classify,
        )

    quarantined = QuarantineShare(config.corpus.sources, config.corpus.max_quarantined_fraction)

    dropped = DroppedShare(config.corpus.sources, config.corpus.max_dropped_fraction)

    def measure(value: dict[str, Any]) -> tuple[int, int, int, bool]:
        quarantined.add(value)
        dropped.add(value)
        return value["counts"]["docs_in"], value["text_bytes"], value["tokens"], bool(value["failed"])

    done = _committed(storage, units)
    found = _mapped("tokenize", partial(_tokenize_unit, settings), units.packed, map_units, report, measure, done)
    quarantined.end()
    dropped.end()
    return [UnitManifest.model_validate(value) for value in found]


def _committed(storage: Storage, units: Units) -> list[dict[str, Any] | None]:
    """The manifests of units that need no task any more: of 45,000 at 5.7 T tokens, hardly one is left after a crash."""
    there = {entry.path for entry in storage.list("datasets/units")}

    def load(unit_id: str) -> dict[str, Any] | None:
        path = shard_path("units", unit_id, ".json")
        return _without_slices(UnitManifest.parse(storage.read(path), path)) if path in there else None

    with ThreadPoolExecutor(READ_THREADS) as pool:
        return list(pool.map(load, units.ids))


def _tokenize_unit(settings: dict[str, TokenizeSettings], packed: bytes) -> dict[str, Any]:
    unit = unpacked(packed)
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
) -> tuple[dict[str, Heldout], NearDuplicatesFound | None, list[PackManifest]]:
    folder = _resolved(plan)
    heldout: dict[str, Heldout] = {}
    indexes: dict[str, Indexes] = {}
    partitions: dict[str, list[Partition]] = {}
    places: dict[str, list[int]] = {}  # of a source's units in the plan
    for source in config.corpus.sources:
        mine = places[source.name] = units.of(source.name)
        manifests, generations = [tokenized[place] for place in mine], [units.generations[place] for place in mine]
        heldout[source.name] = choose_heldout(
            storage, source.name, manifests, generations, config.corpus.heldout_max_documents, plan.tokenizer
        )
        partitions[source.name] = []
        if source.filters.drop_exact_duplicates:
            indexes[source.name], partitions[source.name] = partitions_of(source.name, manifests, folder)
    across: list[Partition] = []
    if config.corpus.drop_duplicates_across_sources:
        numbers = {source.name: number for number, source in enumerate(config.corpus.sources)}
        indexes["_across"], across = partitions_of(
            "_across", tokenized, folder, [numbers[name] for name in units.sources]
        )
    hashes = b"".join(sorted(frozenset().union(*(chosen.hashes for chosen in heldout.values()))))
    entry = FileEntry(path=f"{folder}/heldout.hashes", bytes=len(hashes), sha256=hashlib.sha256(hashes).hexdigest())
    storage.write(entry.path, hashes)
    every = [partition for found in partitions.values() for partition in found] + across
    find = partial(find_duplicates, config.storage, indexes)
    _mapped("resolve", find, every, map_units, report, _uncounted)

    def mapped(phase: str, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        return _mapped(phase, function, items, map_units, report, _uncounted)

    near, paragraphs, long = None, list[str](), ""
    if config.corpus.near_duplicates is not None or config.corpus.duplicate_paragraphs is not None:
        long = find_long_documents(config, units, plan.tokenizer.vocab_size, folder, mapped)
    if config.corpus.near_duplicates is not None:
        near = find_near_duplicates(config, units, tokenized, heldout, long, folder, mapped)
    if config.corpus.duplicate_paragraphs is not None:
        corpus = corpus_of(config, units, tokenized, heldout, near.duplicates.path if near else None, long)
        paragraphs = mapped(
            "paragraphs", partial(find_going, config.storage, corpus), ranges(tokenized, corpus, folder)
        )
    settings = replace(
        _pack_settings(config, plan, entry),
        near=None if near is None else near.duplicates.path,
        paragraphs=tuple(paragraphs),
        duplicate_paragraphs=config.corpus.duplicate_paragraphs,
        duplicates={name: tuple(partition.output for partition in found) for name, found in partitions.items()},
        across=tuple(partition.output for partition in across),
    )

    tasks: list[PackTask] = []
    for place, (unit_id, owner) in enumerate(zip(units.ids, units.sources)):
        mine = places[owner]
        tasks.append(
            PackTask(
                source=owner,
                unit=shard_path("units", unit_id, ".json"),
                place=place - mine[0],
                units=len(mine),
                heldout=tuple(heldout[owner].chosen.get(unit_id, ())),
                place_in_all=place,
                units_in_all=len(units),
            )
        )

    def measure(value: dict[str, Any]) -> tuple[int, int, int, bool]:
        return value["counts"]["docs_out"], value["text_bytes"], _tokens(value["packed"]), False

    found = _mapped("pack", partial(_pack_unit, settings), tasks, map_units, report, measure)
    return heldout, near, [PackManifest.model_validate(value) for value in found]


def _uncounted(_result: Any) -> tuple[int, int, int, bool]:
    """`measure` of a step whose documents were counted before."""
    return 0, 0, 0, False


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
