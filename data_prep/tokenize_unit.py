"""One unit: records -> filters -> rules -> questions of tasks -> token ids -> document shard, index, held-out candidates, quarantine -> unit manifest.

A pure function of the unit, the settings and the tokenizer; whoever runs it, and however often, writes the same bytes, and
the manifest is created last. Memory: one batch of text (8 MB, or one document), its ids, one row group.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
import pyarrow as pa
import xxhash

from data_prep import hash_sorted
from data_prep.contamination.apply import RULE, decontaminate, load_finder
from data_prep.contamination.seen import seen_bytes
from data_prep.filters import rejected_by
from data_prep.near.file import Signatures
from data_prep.paragraphs.parts import Parts
from data_prep.plan import Unit
from data_prep.readers import ReaderSettings, Record, read_slice
from data_prep.records import UnitManifest, shard_path
from data_prep.rejected import RejectedDocuments
from data_prep.rules.apply import apply
from data_prep.rules.classifier import Call, ClassifierFailed, in_process, refused
from data_prep.worker import working
from data_prep.writer import DOCUMENT_SCHEMA, document_table, parquet_writer, put
from pipeline.arrow import column
from pipeline.config.schema import Decontamination, DuplicateParagraphs, NearDuplicates, SourceConfig, StorageConfig
from pipeline.histogram import histogram, together
from pipeline.integrity import read_record
from pipeline.manifest import DocumentCounts, FileEntry, Histogram, TokenizerManifest
from pipeline.storage import Storage, filesystem, open_storage
from pipeline.tokenizer import Encoder
from pipeline.tokenizer.chat import said
from pipeline.tokenizer.engines import REFERENCE, concatenated

log = logging.getLogger(__name__)

BATCH_BYTES = 8 * 1024 * 1024
BATCH_DOCUMENTS = 8192
GROUP_TOKENS = 4 * 1024 * 1024  # of a row group of documents
CROSS_CHECK_ONE_IN = 4000  # documents, and the first of every unit: 1 % of a unit's CPU
CROSS_CHECK_BYTES = 256 * 1024  # larger documents are not cross-checked
INDEX_DTYPE = np.dtype([("high", "<u8"), ("low", "<u8"), ("ordinal", "<u4")])  # 20 bytes, sorted
EXAMPLES = 3  # documents of a unit that are named for every rule that drops some
S3_READ_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class TokenizeSettings:
    """What every unit of a source has in common."""

    storage: StorageConfig
    root: str  # of the source
    source: SourceConfig
    tokenizer: TokenizerManifest
    heldout_fraction: float
    heldout_max_documents: int
    max_document_bytes: int  # effective: see `document_limit`
    keep_rejected: bool
    unit_settings: dict[str, Any]
    near_duplicates: NearDuplicates | None
    duplicate_paragraphs: DuplicateParagraphs | None
    decontamination: Decontamination | None
    questions: FileEntry | None  # with decontamination: what is looked for
    versions: dict[str, str]
    where: str = ""  # the source's place in the configuration, for messages
    classify: Call = in_process  # where its classifier runs


@dataclass
class _Unit:
    """What accumulates while a unit is read."""

    docs_in: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    contaminated: Counter[str] = field(default_factory=Counter)  # documents by task
    seen: Counter[int] = field(default_factory=Counter)  # documents by question
    scores: Histogram | None = None  # of the classifier
    signatures: Signatures | None = None
    parts: Parts | None = None
    hashes: list[bytes] = field(default_factory=list)
    tokens: int = 0
    text_bytes: int = 0
    cross_checked: int = 0
    candidates: list[tuple[bytes, int, np.ndarray, int, str]] = field(
        default_factory=list
    )  # hash, ordinal, ids, n_bytes, doc_id


def token_dtype(vocab_size: int) -> Any:
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def is_heldout_candidate(doc_hash: bytes, fraction: float) -> bool:
    """A property of the document's bytes alone, so copies agree and new files change nothing."""
    return int.from_bytes(doc_hash[:8], "big") < int(fraction * 2.0**64)


def document_hash(text: bytes) -> bytes:
    """128 bits: among 10 billion documents two different ones collide with probability 1e-19. Not meant against an adversary."""
    return xxhash.xxh3_128_digest(text)


class EnginesDisagree(RuntimeError):
    """The ids of a document are not the reference's."""


@lru_cache(maxsize=1)
def load_encoder(storage: StorageConfig, folder: str, sha256: str, engines: tuple[str, ...]) -> Encoder:
    """One per process: loading takes about two seconds for 163,840 tokens. `sha256` is that of its tokenizer.json; all files are
    checked against the record beside them."""
    place, path = open_storage(storage), f"{folder}/manifest.json"
    encoder = Encoder.stored(TokenizerManifest.parse(place.read(path), place.uri(path)), place, engines)
    if encoder.sha256 != sha256:
        raise ValueError(
            f"{folder}/tokenizer.json has sha256 {encoder.sha256}, but the dataset's tokenizer has {sha256}"
        )
    return encoder


@working()
def tokenize_unit(settings: TokenizeSettings, unit: Unit) -> UnitManifest:
    """The committed manifest; at once if the unit is done already."""
    storage = open_storage(settings.storage)
    done = read_record(storage, shard_path("units", unit.id, ".json"), UnitManifest)
    if done is not None:
        return done
    try:
        return _tokenize(storage, unit, settings, settings.tokenizer.engines)
    except EnginesDisagree as error:
        log.warning("unit %s: %s; the whole unit is encoded by %s instead, slowly", unit.id, error, REFERENCE)
        return _tokenize(storage, unit, settings, (REFERENCE,))


def _tokenize(storage: Storage, unit: Unit, settings: TokenizeSettings, engines: tuple[str, ...]) -> UnitManifest:
    encoder = load_encoder(settings.storage, settings.tokenizer.folder, settings.tokenizer.sha256, engines)
    near, paragraphs, prose = settings.near_duplicates, settings.duplicate_paragraphs, not settings.source.conversations
    state = _Unit(
        signatures=Signatures(near) if prose and near is not None else None,
        parts=Parts(paragraphs) if prose and paragraphs is not None else None,
    )
    with tempfile.TemporaryDirectory(prefix="unit-") as folder:
        documents = _Documents(Path(folder) / "documents.parquet", settings.tokenizer.vocab_size)
        rejected = RejectedDocuments(Path(folder) / "rejected.parquet") if settings.keep_rejected else None
        with (Path(folder) / "quarantine.jsonl").open("wb") as quarantine:
            records = _that_fit(_records(settings, unit), encoder, settings.source.conversations)
            for batch in _batches(_usable(records, state, settings, quarantine, rejected)):
                if settings.source.rules.any:
                    batch = _kept(batch, unit, state, settings, rejected)
                if settings.decontamination is not None:
                    batch = _decontaminated(batch, state, settings, rejected)
                if batch:
                    _encode(batch, encoder, documents, state, settings)
        documents.close()
        if rejected is not None:
            rejected.close()
        return _commit(storage, unit, settings, state, documents, rejected, Path(folder), engines)


def _records(settings: TokenizeSettings, unit: Unit) -> Iterator[Record]:
    reader = ReaderSettings.of(settings.source, settings.max_document_bytes)
    for part in unit.slices:
        with open_input(settings.root, part.path, settings.storage) as file:
            if _size(file) != part.bytes or _etag(file) not in (None, part.identity):
                raise RuntimeError(
                    f"{settings.root}/{part.path} is not the file that was listed any more; run prepare again"
                )
            yield from read_slice(part, file, reader)


def open_input(root: str, path: str, storage: StorageConfig) -> IO[bytes]:
    """Binary and seekable; on S3 ranged reads, ahead of the reader."""
    fs = filesystem(root, storage)
    key = f"{root.removeprefix('s3://')}/{path}"
    file: IO[bytes] = fs.open(key, "rb", block_size=S3_READ_BYTES) if root.startswith("s3://") else fs.open(key, "rb")
    return file


def _size(file: IO[bytes]) -> int:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


def _etag(file: IO[bytes]) -> str | None:
    """Of an S3 object, as `InputFile.identity` has it; every ranged read of the opened file asks for this version."""
    etag = getattr(file, "details", {}).get("ETag")
    return None if etag is None else "etag:" + str(etag).strip('"')


def _that_fit(records: Iterator[Record], encoder: Encoder, conversations: bool) -> Iterator[Record]:
    for record in records:
        if record.reason or encoder.takes(record.text):
            why = _refused_by_template(record, encoder) if conversations and not record.reason else ""
            yield replace(record, text=b"", reason="template_refuses", excerpt=why.encode()[:200]) if why else record
        else:
            yield replace(record, text=b"", reason="too_large_for_engine", excerpt=record.text[:200])


def _refused_by_template(record: Record, encoder: Encoder) -> str:
    """Why the chat template does not lay out a conversation of these roles; '' if it does."""
    try:
        encoder.chat.parts(tuple(message["role"] for message in orjson.loads(record.text)))
    except ValueError as error:
        return str(error)
    return ""


def _usable(
    records: Iterator[Record],
    state: _Unit,
    settings: TokenizeSettings,
    quarantine: IO[bytes],
    rejected: RejectedDocuments | None,
) -> Iterator[Record]:
    """Count every record; pass on those that are fit to tokenize."""
    filters, talks = settings.source.filters, settings.source.conversations
    for record in records:
        state.docs_in += 1
        if record.reason:
            state.quarantined[record.reason] += 1
            line = {
                "location": record.location,
                "reason": record.reason,
                "excerpt": record.excerpt.decode("utf-8", errors="backslashreplace"),
            }
            quarantine.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        elif rejection := record.rejected or rejected_by(record.text, filters, conversation=talks):
            state.filtered[rejection] += 1
            if rejected is not None:
                rejected.add(record.location, record.doc_id, rejection, record.text)
        else:
            yield record


def _kept(
    batch: list[Record], unit: Unit, state: _Unit, settings: TokenizeSettings, rejected: RejectedDocuments | None
) -> list[Record]:
    """What the source's rules leave of a batch, with the texts that they leave. Raises ConfigError for what its classifier does."""
    kept, rules = [], settings.source.rules
    try:
        outcomes = apply([record.text.decode() for record in batch], rules, settings.classify)
    except ClassifierFailed as error:
        assert rules.classifier is not None
        raise refused(settings.where, rules.classifier, error, unit.id) from None
    scores = [outcome.score for outcome in outcomes if outcome.score is not None]
    state.scores = together([state.scores, histogram(scores)])
    for record, outcome in zip(batch, outcomes):
        if outcome.rejected:
            _drop(record, outcome.rejected, state, rejected)
            continue
        state.changes += outcome.changes
        if outcome.language:
            state.languages[outcome.language] += 1
        kept.append(replace(record, text=outcome.text.encode()))
    return kept


def _decontaminated(
    batch: list[Record], state: _Unit, settings: TokenizeSettings, rejected: RejectedDocuments | None
) -> list[Record]:
    """What is left of a batch, and of its texts, when questions of the evaluation's tasks have been looked for."""
    assert settings.decontamination is not None
    assert settings.questions is not None
    talks = settings.source.conversations
    texts = [said(record.text) if talks else record.text.decode() for record in batch]
    finder = load_finder(settings.storage, settings.questions, settings.decontamination)
    outcomes = decontaminate(texts, finder, may_cut=not talks)
    kept = []
    for number, record in enumerate(batch):
        outcome = outcomes.get(number)
        if outcome is None:
            kept.append(record)
            continue
        state.contaminated.update(outcome.tasks)
        state.seen.update(outcome.questions)
        if outcome.text is None:
            _drop(record, outcome.name, state, rejected)
            continue
        for task in outcome.tasks:
            _show(record, f"{RULE}.{task}", state)
        if outcome.cuts:
            state.changes[f"{RULE}.cut"] += outcome.cuts
            record = replace(record, text=outcome.text.encode())
        kept.append(record)
    return kept


def _drop(record: Record, name: str, state: _Unit, rejected: RejectedDocuments | None) -> None:
    state.filtered[name] += 1
    _show(record, name, state)
    if rejected is not None:
        rejected.add(record.location, record.doc_id, name, record.text)


def _show(record: Record, name: str, state: _Unit) -> None:
    shown = state.examples.setdefault(name, [])
    if len(shown) < EXAMPLES:
        shown.append(record.location)


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        if batch and (size + len(record.text) > BATCH_BYTES or len(batch) == BATCH_DOCUMENTS):
            yield batch
            batch, size = [], 0
        batch.append(record)
        size += len(record.text)
    if batch:
        yield batch


def _encode(
    batch: list[Record], encoder: Encoder, documents: _Documents, state: _Unit, settings: TokenizeSettings
) -> None:
    texts = [record.text for record in batch]
    sizes = [len(text) for text in texts]
    if settings.source.conversations:
        ids, offsets, sizes = encoder.chat.encode(texts, encoder)
    else:
        ids, offsets = encoder.encode(texts)
    assert not len(ids) or int(ids.max()) < settings.tokenizer.vocab_size, "an id outside the vocabulary"
    hashes = [document_hash(text) for text in texts]
    for index, doc_hash in enumerate(hashes):
        if int.from_bytes(doc_hash[8:], "big") % CROSS_CHECK_ONE_IN == 0 or (not state.hashes and index == 0):
            found = ids[offsets[index] : offsets[index + 1]]
            _cross_check(batch[index], found, encoder, state, settings.source.conversations)
        if is_heldout_candidate(doc_hash, settings.heldout_fraction):
            tokens = ids[offsets[index] : offsets[index + 1]].astype(documents.dtype)
            state.candidates.append((doc_hash, len(state.hashes) + index, tokens, sizes[index], batch[index].doc_id))
    if len(state.candidates) > 2 * settings.heldout_max_documents:
        state.candidates = _smallest(state.candidates, settings.heldout_max_documents)
    documents.add(ids, offsets, hashes, sizes, [record.doc_id for record in batch])
    if state.signatures is not None:
        state.signatures.add(texts, hashes)
    if state.parts is not None:
        state.parts.add(texts, hashes)
    state.hashes += hashes
    state.tokens += len(ids)
    state.text_bytes += sum(sizes)
    encoder.recycle()


class _Reference:
    """The reference as an encoder of several texts."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def encode(self, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        return concatenated([self._encoder.check(document) for document in documents])


def _cross_check(record: Record, ids: np.ndarray, encoder: Encoder, state: _Unit, conversation: bool) -> None:
    if len(record.text) > CROSS_CHECK_BYTES:
        return
    if conversation:
        expected, _, _ = encoder.chat.encode([record.text], _Reference(encoder))
    else:
        expected = encoder.check(record.text)
    if not np.array_equal(ids, expected):
        at = next((i for i, (a, b) in enumerate(zip(ids, expected)) if a != b), min(len(ids), len(expected)))
        raise EnginesDisagree(
            f"{record.location}: the two encoders disagree from token {at} on ({len(ids)} and {len(expected)} tokens, "
            f"{encoder.engines[0]} and {REFERENCE})"
        )
    state.cross_checked += 1


def _smallest(candidates: list[Any], count: int) -> list[Any]:
    return sorted(candidates, key=lambda candidate: candidate[:2])[:count]


class _Documents:
    """The document shard under construction: row groups of about GROUP_TOKENS tokens."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.path = path
        self.dtype = token_dtype(vocab_size)
        self._writer = parquet_writer(path, DOCUMENT_SCHEMA)
        self._tables: list[pa.Table] = []
        self._waiting = 0

    def add(
        self, ids: np.ndarray, offsets: np.ndarray, hashes: list[bytes], sizes: list[int], doc_ids: list[str]
    ) -> None:
        self._tables.append(document_table(ids.astype(self.dtype), offsets, hashes, sizes, doc_ids))
        self._waiting += len(ids)
        if self._waiting >= GROUP_TOKENS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._tables:
            table = pa.concat_tables(self._tables)
            self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self._tables, self._waiting = [], 0


def _commit(
    storage: Storage,
    unit: Unit,
    settings: TokenizeSettings,
    state: _Unit,
    documents: _Documents,
    rejected: RejectedDocuments | None,
    folder: Path,
    engines: tuple[str, ...],
) -> UnitManifest:
    entries: dict[str, Any] = {"documents": None, "index": None, "candidates": None, "quarantine": None}
    if rejected is not None and rejected.count:
        entries["rejected"] = put(storage, rejected.path, shard_path("rejected", unit.id, ".parquet"))
    if state.hashes:
        (folder / "index").write_bytes(index_bytes(state.hashes))
        entries["documents"] = put(storage, documents.path, shard_path("documents", unit.id, ".parquet"))
        entries["index"] = put(storage, folder / "index", shard_path("documents", unit.id, ".index"))
        if state.signatures is not None:
            (folder / "bands").write_bytes(state.signatures.to_bytes())
            entries["bands"] = put(storage, folder / "bands", shard_path("documents", unit.id, ".bands"))
        if state.parts is not None:
            (folder / "parts").write_bytes(state.parts.to_bytes())
            entries["paragraphs"] = put(storage, folder / "parts", shard_path("documents", unit.id, ".parts"))
    if state.seen:
        (folder / "seen").write_bytes(seen_bytes(state.seen))
        entries["seen"] = put(storage, folder / "seen", shard_path("documents", unit.id, ".seen"))
    if state.candidates:
        path = folder / "candidates.parquet"
        _write_candidates(path, _smallest(state.candidates, settings.heldout_max_documents))
        entries["candidates"] = put(storage, path, shard_path("documents", unit.id, ".heldout.parquet"))
    if state.quarantined:
        entries["quarantine"] = put(storage, folder / "quarantine.jsonl", shard_path("quarantine", unit.id, ".jsonl"))
    counts = DocumentCounts(
        docs_in=state.docs_in,
        docs_out=len(state.hashes),
        heldout=0,
        filtered=dict(sorted(state.filtered.items())),
        quarantined=dict(sorted(state.quarantined.items())),
    )
    assert counts.balanced(), f"unit {unit.id}: documents were lost: {counts}"
    manifest = UnitManifest(
        id=unit.id,
        source=unit.source,
        slices=tuple(asdict(part) for part in unit.slices),
        settings=settings.unit_settings,
        counts=counts,
        tokens=state.tokens,
        text_bytes=state.text_bytes,
        cross_checked=state.cross_checked,
        engines=engines,
        changes=dict(sorted(state.changes.items())),
        languages=dict(sorted(state.languages.items())),
        contaminated=dict(sorted(state.contaminated.items())),
        scores=state.scores,
        examples={name: tuple(shown) for name, shown in sorted(state.examples.items())},
        versions=settings.versions,
        **entries,
    )
    storage.create(manifest.path, manifest.to_json())
    return manifest


def index_bytes(hashes: list[bytes]) -> bytes:
    """INDEX_DTYPE records sorted by hash (hash_sorted.py)."""
    halves = np.frombuffer(b"".join(hashes), ">u8").reshape(-1, 2)
    records = np.empty(len(hashes), INDEX_DTYPE)
    records["high"], records["low"], records["ordinal"] = halves[:, 0], halves[:, 1], np.arange(len(hashes))
    records = records[np.lexsort((records["ordinal"], records["low"], records["high"]))]
    return hash_sorted.to_bytes(records, records["high"])


def _write_candidates(path: Path, candidates: list[tuple[bytes, int, np.ndarray, int, str]]) -> None:
    columns = {
        "tokens": column([tokens.tobytes() for _, _, tokens, _, _ in candidates], pa.binary()),
        "n_bytes": column([n_bytes for _, _, _, n_bytes, _ in candidates], pa.int64()),
        "doc_id": column([doc_id for *_, doc_id in candidates], pa.string()),
        "doc_hash": column([doc_hash for doc_hash, *_ in candidates], pa.binary(16)),
        "ordinal": column([ordinal for _, ordinal, *_ in candidates], pa.int64()),
    }
    table = pa.Table.from_arrays(list(columns.values()), list(columns))
    with parquet_writer(path, table.schema) as writer:
        writer.write_table(table)
