"""Prepare: raw files to a committed dataset (data_prep/prepare.py), units of work as Ray Data tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from data_prep.dataset import total_counts
from data_prep.formats import ROWS, SEEKING, format_of, is_compressed
from data_prep.listing import InputFile, Listing
from data_prep.look import look
from data_prep.prepare import prepare
from data_prep.records import PrepareProgress
from data_prep.room import text_bytes, written_share
from data_prep.rules.check import check_classifiers
from data_prep.tokenizer_stage import check_given, find_tokenizer
from jobs.on_ray.gauges import PREPARING, PrepareGauges
from jobs.stages import questions
from jobs.stages.disk import check_room
from jobs.stages.records import Records, dataset_identity, held_dataset, hold_dataset
from pipeline.config.load import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.dataset.order import check_demand
from pipeline.file_index import read_dataset
from pipeline.manifest import DatasetManifest
from pipeline.planner import preparing as planned
from pipeline.publishing import registry
from pipeline.storage import Storage
from pipeline.training import initial
from pipeline.workflow.record import StageProgress

NAME = "prepare"
SUMMARY = "Tokenize and shard the corpus into a packed, checksummed dataset."
GAUGES = PREPARING
COPIES = (
    "exact_duplicate",
    "exact_duplicate_across_sources",
    "heldout_copy",
    "near_duplicate",
    "duplicate_paragraphs",
)  # reasons to drop a document for another
SHORTEST_LINE = 12  # bytes of {"text":"x"}


def find(config: RunConfig, storage: Storage, records: Records) -> DatasetManifest | None:
    """Raises ConfigError for a corpus that is missing or empty, and for a demand that the prepared data cannot meet."""
    name = held_dataset(config, storage, records.seen_by) or dataset_identity(config, storage, records.corpus(config))
    try:
        return _enough(config, read_dataset(storage, name))
    except FileNotFoundError:
        return None


def check(config: RunConfig, storage: Storage, records: Records, *, here: bool) -> None:
    if held_dataset(config, storage) is None:
        listings = records.corpus(config)
        for index, source in enumerate(config.corpus.sources):
            look(source, index, listings[source.name], config)
        check_given(config)
        check_supply(config, listings)
        check_room(
            storage,
            planned.preparing(config, text_bytes(config, listings)).dataset_bytes,
            "tokenized and packed rows",
            "lower corpus.sources.max_bytes",
            lambda: written_share(questions.pinned(config, storage), storage, listings),
        )
        check_tokenizer(config, storage, listings)
        if here:
            check_classifiers(config.corpus)
            questions.check(config, storage)


def do(config: RunConfig, storage: Storage, records: Records, report: Callable[[PrepareProgress], None]) -> None:
    from data_prep.mapping import map_on_ray
    from data_prep.rules.actors import classifier_actors

    gauges = PrepareGauges(config.run_id, then=report)
    listings = records.corpus(config)
    asked = questions.pin(config, storage)
    with classifier_actors(asked) as classify:
        dataset = prepare(
            asked, storage, listings=listings, map_units=map_on_ray(config.cluster), classify=classify, report=gauges
        )
    print(outcome(dataset), flush=True)
    hold_dataset(config, storage, _enough(config, dataset))


def outcome(dataset: DatasetManifest) -> str:
    """What became of the documents, in one line: duplicates and filtered and quarantined ones by reason, and the padding."""
    counts = total_counts([source.counts for source in dataset.sources])
    copies = {reason: count for reason, count in counts.filtered.items() if reason in COPIES}
    filtered = {reason: count for reason, count in counts.filtered.items() if reason not in COPIES}
    return (
        f"{NAME:<9} {counts.docs_in:,} documents in: {counts.docs_out:,} kept, {counts.heldout:,} held out, "
        f"{_by_reason(copies)} duplicates, {_by_reason(filtered)} filtered, {_by_reason(counts.quarantined)} quarantined; "
        f"{dataset.tokens:,} tokens, {dataset.padding:.2%} padding" + _changed(dataset) + _contaminated(dataset)
    )


def _changed(dataset: DatasetManifest) -> str:
    """What rules changed in documents that stayed, and their languages, where there is something to say."""
    changes, languages = Counter[str](), Counter[str]()
    for source in dataset.sources:
        changes.update(source.changes)
        languages.update(source.languages)
    told = f"; changed: {', '.join(f'{name} {count:,}' for name, count in sorted(changes.items()))}" if changes else ""
    if languages:
        total = languages.total()
        told += f"; languages: {', '.join(f'{name} {count / total:.1%}' for name, count in languages.most_common(5))}"
    return told


def _contaminated(dataset: DatasetManifest) -> str:
    """Which questions of the evaluation's tasks were in the corpus, where they were looked for."""
    found = dataset.contamination
    if found is None:
        return ""
    tasks = ", ".join(
        f"{name} {task.seen:,} of {task.looked_for:,} in {task.documents:,} documents"
        for name, task in found.tasks.items()
    )
    done = {"drop": "dropped", "cut": "cut out", "report": "left in"}[found.action]
    return f"; questions of tasks, {done}: {tasks}"


def _by_reason(counts: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items()) if count)
    return f"{sum(counts.values()):,}" + (f" ({reasons})" if reasons else "")


def progress() -> Callable[[PrepareProgress], StageProgress]:
    return _progress


def _progress(at: PrepareProgress) -> StageProgress:
    note = (
        f"{at.phase}  {at.documents:,} documents  {at.text_bytes / 1e6:,.1f} MB ({at.megabytes_per_second:,.1f} MB/s)"
    )
    if at.padding is not None:
        note = f"{at.phase}  {at.padding:.2%} padding"
    if at.units_failed:
        note += f"  {at.units_failed} FAILED"
    return StageProgress(
        NAME, at.units_done, at.units_total, "units", at.tokens_per_second, "tokens", at.eta_seconds, note
    )


def _enough(config: RunConfig, dataset: DatasetManifest) -> DatasetManifest:
    try:
        check_demand(config, dataset)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return dataset


def check_supply(config: RunConfig, listings: Mapping[str, Sequence[InputFile]]) -> None:
    """Refuse, before any work, a demand that no tokenizer could meet. Raises ConfigError.

    Generous, because only the tokenized corpus knows (`check_demand`, after prepare): a token is at least one byte or ends a
    document, packing fills rows at least half unless it may not put many documents into one, and a document is a file or a
    line of some bytes. Nothing bounds what a
    compressed file holds, or how empty the rows of `data.packing=pad` are.
    """
    for index, source in enumerate(config.corpus.sources):
        files = listings[source.name]
        formats = {format_of(file.path, source.format) for file in files}
        if config.data.packing == "pad" or formats & SEEKING or any(is_compressed(file.path) for file in files):
            continue
        size = sum(file.bytes for file in files)
        documents = len(files) + (size // SHORTEST_LINE if formats & ROWS else 0)
        few = config.data.max_documents_per_row
        padded = documents * config.data.sequence_length // few if few else 0
        most = int(source.max_epochs * (2 * (size + documents) + padded))
        demand = planned.demand(config, source.name)
        if demand > most:
            raise ConfigError(
                f"schedule.total_tokens {config.schedule.total_tokens:,} asks for {demand:,.0f} tokens of source {source.name!r}, "
                f"whose {size:,} bytes give less than {most:,} over the epochs allowed: add text, raise "
                f"corpus.sources[{index}].max_epochs, lower its weight or train on less"
            )


def check_tokenizer(config: RunConfig, storage: Storage, listings: dict[str, Listing]) -> None:
    """Refuse, before prepare, a corpus whose tokenizer is not that of the model the run starts from. Raises ConfigError."""
    manifest = initial.find(config, storage)
    if manifest is None:
        return
    tokenizer = find_tokenizer(config, storage, listings)
    if tokenizer is not None:
        initial.check(config, storage, tokenizer.sha256)
    elif config.tokenizer.path is None:
        folder = storage.uri(registry.folder(manifest.name, manifest.version))
        raise ConfigError(
            f"tokenizer.path: the corpus lost files or the tokenizer's settings changed, so a new one would be trained, but the run "
            f"starts from {manifest.name} {manifest.version}: set tokenizer.path to {folder}"
        )
