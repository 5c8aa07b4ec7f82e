"""The typed records that stages hand to each other, and the digests that tie them together.

A record is JSON. Its digest is sha256 over the canonical JSON (sorted keys, no spaces) of everything that determines
the bytes downstream; what merely describes how they came about (times, host names, paths of the storage root) never
enters it. So the same inputs give the same digest on a laptop folder and on S3.

In storage a record also carries `record_sha256`, over all of its own fields, so that a flipped bit or a torn write is found
when it is read. Who edits a record by hand removes that line: a record without it is taken as it is.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

OWN_DIGEST = "record_sha256"


class DamagedRecord(ValueError):
    """A stored record is torn, changed or of another version; the message has its path and what is wrong."""


def canonical_json(value: Any) -> bytes:
    """Bytes that depend on the value alone. NaN and infinity are refused: they have no JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """sha256 (64 hex digits) of the canonical JSON; pydantic models are dumped first."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return hashlib.sha256(canonical_json(value)).hexdigest()


class Record(BaseModel):
    """A manifest. `VOLATILE` names the fields that describe the making, not the thing: they are left out of the digest,
    also of the digest of a record that holds this one."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    VOLATILE: ClassVar[frozenset[str]] = frozenset()
    OPTIONAL: ClassVar[frozenset[str]] = frozenset()  # left out of the digest while they have their default

    @property
    def digest(self) -> str:
        return digest_of(_without_volatile(self))

    def to_json(self) -> bytes:
        """For storage and people, with the digest of its fields. Raises ValueError for NaN and infinity."""
        fields = self.model_dump(mode="json")
        stored = {OWN_DIGEST: digest_of(fields), **fields}
        return json.dumps(stored, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes, where: str) -> Self:
        """The record that `to_json` gave. Raises DamagedRecord, which names `where` it lies."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            why = f"{place}: {first['msg']}" if place else first["msg"]
            raise DamagedRecord(
                f"{where}: not a sound {cls.__name__} ({why}): damaged, or made by another version; restore it from a copy, "
                "or delete it and run the stage that made it again"
            ) from None

    @model_validator(mode="before")
    @classmethod
    def _check_own_digest(cls, values: Any) -> Any:
        return _checked_fields(values)


def fields_of(data: bytes) -> dict[str, Any]:
    """The fields of a stored record of whatever kind, as its digest covers them. Raises ValueError for one that is torn or changed."""
    fields = _checked_fields(json.loads(data))
    if not isinstance(fields, dict):
        raise ValueError("not a record")
    return fields


def _checked_fields(values: Any) -> Any:
    if not isinstance(values, dict) or OWN_DIGEST not in values:
        return values
    fields = {name: value for name, value in values.items() if name != OWN_DIGEST}
    found = digest_of(fields)
    if found != values[OWN_DIGEST]:
        raise ValueError(f"its fields have the sha256 {found[:16]}..., {OWN_DIGEST} says {values[OWN_DIGEST]}")
    return fields


def _without_volatile(value: Any) -> Any:
    if isinstance(value, Record):
        fields = type(value).model_fields
        absent = {name for name in value.OPTIONAL if getattr(value, name) == fields[name].default}
        return {name: _without_volatile(getattr(value, name)) for name in fields.keys() - value.VOLATILE - absent}
    if isinstance(value, dict):
        return {key: _without_volatile(inner) for key, inner in value.items()}
    return [_without_volatile(inner) for inner in value] if isinstance(value, list | tuple) else value


class StoredFile(Record):
    """An object in storage whose bytes something else vouches for. `path` is relative to the storage root."""

    path: str
    bytes: int


class FileEntry(StoredFile):
    """An object in storage, and the digest of its bytes."""

    sha256: str


class TokenizerManifest(Record):
    """`<root>/tokenizers/<identity>/manifest.json`"""

    folder: str  # relative to the storage root
    files: tuple[FileEntry, ...]  # tokenizer.json, tokenizer_config.json, tiktoken.model, ...
    vocab_size: int
    eos_id: int
    special_tokens: dict[str, int]
    sha256: str  # of tokenizer.json: the identity that data carries
    engines: tuple[str, ...] = ("tokenizers",)  # that give its ids: of documents, and of those with newer letters
    notes: tuple[str, ...] = ()  # what whoever prepares a corpus with it should know


class PackedFile(FileEntry):
    """A Parquet file of packed rows: whole row groups only, `rows = groups * rows_per_group`."""

    rows: int
    tokens: int  # without padding
    group_crc32: str  # 8 hex digits per row group and 8 for the footer (pipeline/packed.py)


class HeldoutFile(FileEntry):
    """A Parquet file of held-out documents (tokens, n_bytes, doc_id), never trained on."""

    documents: int
    tokens: int  # EOS not counted
    text_bytes: int  # UTF-8 bytes of the text behind the tokens


# Of a unit's and a pack's record (data_prep/records.py), which verify reads as plain fields: left out of its digest while they are empty
UNIT_OPTIONAL = frozenset({"changes", "languages", "examples", "bands", "contaminated", "seen", "paragraphs", "scores"})
PACK_OPTIONAL = frozenset({"changes"})


class DocumentCounts(Record):
    """docs_in = docs_out + heldout + filtered + quarantined, checked per unit and in total."""

    docs_in: int
    docs_out: int
    heldout: int
    filtered: dict[str, int]  # by filter name
    quarantined: dict[str, int]  # by reason

    def balanced(self) -> bool:
        return self.docs_in == self.docs_out + self.heldout + sum(self.filtered.values()) + sum(
            self.quarantined.values()
        )


class Histogram(Record):
    """How many numbers lie in [k w, (k + 1) w) for k = first, first + 1, ..., where w = 2 ** log2_width (pipeline/histogram.py)."""

    log2_width: int
    first: int
    counts: tuple[int, ...]  # of the first bin and the last more than 0

    @property
    def edges(self) -> list[float]:
        """The lower edge of each bin."""
        return [(self.first + place) * 2.0**self.log2_width for place in range(len(self.counts))]


class SourceManifest(Record):
    name: str
    heldout: tuple[HeldoutFile, ...]
    failed_units: tuple[str, ...] = ()  # units that killed their worker; each is one quarantined record
    counts: DocumentCounts
    rows: int
    tokens: int  # in packed rows, without padding
    text_bytes: int
    dropped_rows: int  # rows short of a whole row group
    changes: dict[str, int] = {}  # that rules made to documents which were kept, by name: c4.lines, personal_data.email
    languages: dict[str, int] = {}  # documents that rules kept, by language, where it was asked for
    contaminated: dict[str, int] = {}  # documents with a question of it, by task, where it was looked for
    scores: Histogram | None = None  # of a classifier, of all documents that it saw

    VOLATILE: ClassVar[frozenset[str]] = frozenset()
    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"changes", "languages", "contaminated", "scores"})


class NearDuplicatesFound(Record):
    """The near-duplicates of a dataset version (data_prep/near). Documents are numbered over all units, in the order of the plan."""

    duplicates: FileEntry  # of each unit the documents that are left out
    clusters: FileEntry  # uint64 pairs, little-endian: the document that is kept, and one that is left out for it
    count: int  # of clusters
    dropped: int  # documents, copies among them


class TaskContamination(Record):
    """The questions of a task that the corpus held, before anything was done about it."""

    questions: int
    looked_for: int  # of these; the others are too short
    seen: int
    documents: int  # that hold at least one


class Contamination(Record):
    """What was found of the evaluation's tasks in the corpus of a dataset version (data_prep/contamination), and what was done."""

    rule: str  # ngram, span
    ngram: int  # words
    action: str  # drop, cut, report
    questions: FileEntry  # hashes of their words, by task and the harness's key
    seen: FileEntry  # task, key, documents
    tasks: dict[str, TaskContamination]


class DatasetManifest(Record):
    """`<root>/datasets/<identity>/dataset.json`: written last, and so the commit of the dataset."""

    schema_version: Literal[2] = 2
    identity: str  # digest of listing, corpus config, tokenizer and layout
    tokenizer: TokenizerManifest
    token_dtype: Literal["uint16", "uint32"]
    sequence_length: int
    rows_per_group: int
    sources: tuple[SourceManifest, ...]
    files: FileEntry  # the index of packed files, document shards, quarantine and records (pipeline/file_index.py)
    versions: dict[str, str]  # format version and the libraries that decide bytes
    near_duplicates: NearDuplicatesFound | None = None  # where they were looked for
    contamination: Contamination | None = None  # the same

    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"near_duplicates", "contamination"})

    @property
    def rows(self) -> int:
        return sum(source.rows for source in self.sources)

    @property
    def tokens(self) -> int:
        return sum(source.tokens for source in self.sources)

    @property
    def padding(self) -> float:
        """Share of the slots of all packed rows that hold no token."""
        return 1 - self.tokens / (self.rows * self.sequence_length) if self.rows else 0.0

    def check_padding(self, limit: float) -> None:
        """Raises ValueError for a source with a larger share of padding than `data.max_padding`."""
        for source in self.sources:
            slots = source.rows * self.sequence_length
            if slots - source.tokens > limit * slots:
                raise ValueError(
                    f"source {source.name!r}: {slots - source.tokens:,} of the {slots:,} slots of its packed rows are padding "
                    f"({1 - source.tokens / slots:.1%}), and data.max_padding is {limit:g}: pack with data.packing=best_fit and without "
                    "data.max_documents_per_row, add text (each unit of it ends in a row that is not full), shorten "
                    "data.sequence_length, or raise data.max_padding"
                )


class CheckpointManifest(Record):
    """`<root>/runs/<run_id>/train/step-00000400/manifest.json`: written last; without it the checkpoint does not exist."""

    run_id: str
    run_identity: str  # digest of what decides the losses: model, optimizer, schedule, data order, seed
    step: int
    next_sequence: int  # the loader's whole state
    tokens_seen: int  # labels trained on; the position in slots is next_sequence * training.sequence_length
    dataset_digest: str
    order_digest: str
    content_sha256: str  # of the tensors, independent of world size and of how they are laid out in files
    files: tuple[StoredFile, ...]
    metadata_sha256: str = ""  # of `.metadata`, which has a checksum of every piece of the parts
    metrics: tuple[FileEntry, ...] = ()  # what was logged up to this step, as it was then
    loss: float | None  # nats per token, of the last step that had a loss; None: none has
    skipped_steps: int = 0  # up to here
    left_out: tuple[
        tuple[int, int], ...
    ] = ()  # global positions, besides training.skip_sequences (training/left_out.py)
    world_size: int
    mesh: dict[str, int] = {}  # replicate, shard, ep of the ranks that wrote it
    fence: int | None = None  # fencing number of the writer; None: written without a lease
    average_of: tuple[int, ...] = ()  # steps whose weights this is the mean of, without an optimizer's state
    average_content: tuple[str, ...] = ()  # content_sha256 of each of these
    newton_schulz: str = (
        ""  # what its products multiplied up to here: bf16, fp16 or fp32; "": AdamW alone, or not recorded
    )

    VOLATILE: ClassVar[frozenset[str]] = frozenset(
        {"files", "metadata_sha256", "metrics", "world_size", "mesh", "fence", "average_content", "newton_schulz"}
    )
    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"skipped_steps", "left_out", "average_of"})


class TrainManifest(Record):
    """`<root>/runs/<run_id>/train/manifest.json`: the run reached `schedule.total_tokens`."""

    identity: str
    checkpoint: CheckpointManifest  # the last one
    steps: int
    metrics: tuple[FileEntry, ...]  # JSON lines, one record per logged step
    skipped_steps: int


class SourceScore(Record):
    documents: int
    tokens: int  # scored tokens, the closing EOS of each document included
    text_bytes: int
    loss: float  # nats per token
    bits_per_byte: float
    stderr: float | None = (
        None  # of the loss, over documents (evaluation/errors.py); None: one document, or not recorded
    )
    bits_stderr: float | None = None  # of the bits per byte

    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"stderr", "bits_stderr"})


class TaskMetric(Record):
    name: str  # acc, acc_norm, exact_match, word_perplexity, ...
    filter: str  # how answers were cut out of generated text: "none", "strict-match", ...
    value: float | None  # None: not a finite number
    stderr: float | None  # None where there is none for this metric, or only one document
    higher_is_better: bool | None

    @property
    def label(self) -> str:
        return self.name if self.filter == "none" else f"{self.name} ({self.filter})"

    @property
    def shown(self) -> str:
        error = "" if self.stderr is None else f" ± {self.stderr:.4f}"
        return "no finite number" if self.value is None else f"{self.value:.4f}{error}"


class TaskScore(Record):
    """A task of lm-eval, or the average of a group of tasks."""

    version: str  # of the task, in its YAML; scores of different versions do not compare
    few_shot: int | None  # examples before each question; None: the tasks of the group differ
    documents: int
    group: str | None  # the group whose average counts this one
    metrics: tuple[TaskMetric, ...]
    unseen_documents: int | None = None  # that the training corpus did not hold; None: nobody looked for them there
    unseen: tuple[TaskMetric, ...] = ()  # of these alone

    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"unseen_documents", "unseen"})


class EvaluationManifest(Record):
    """`<root>/runs/<run_id>/evaluate/step-00000400.json`"""

    identity: str
    checkpoint_digest: str
    dataset_digest: str
    step: int
    sequence_length: int
    overall: SourceScore
    sources: dict[str, SourceScore]
    unigram_entropy: float  # nats per token of the same held-out tokens under their own frequencies
    baselines: dict[str, float]  # bits per byte of simple compressors, e.g. {"xz -9": 2.1}
    source_baselines: dict[str, dict[str, float]]  # the same, each source's text by itself
    harness: str = ""  # "lm-eval 0.4.13", where tasks were scored
    tasks: dict[str, TaskScore] = {}
    tokens_seen: int | None = None  # by the checkpoint: where it stands on a curve
    tokenizer_sha256: str = ""  # under another one losses per token do not compare
    documents: FileEntry | None = None  # what each document scored (evaluation/documents.py)

    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"harness", "tasks", "tokens_seen", "tokenizer_sha256", "documents"})


class ModelManifest(Record):
    """`<root>/models/<name>/<version>/manifest.json`: every file of the published folder, and where it came from."""

    name: str
    version: str
    files: tuple[FileEntry, ...]  # paths relative to the model's folder
    checkpoint_digest: str
    evaluation_digest: str
    dataset_digest: str
    tokenizer_sha256: str
    run_identity: str
    config: dict[
        str, Any
    ]  # the run's configuration without what may change from start to start (publishing/version.py)
    git_commit: str
    step: int
    loss: float
    bits_per_byte: float
    xxh3: dict[str, str] = {}  # of the bytes of each tensor, and of each weight file's header under the file's name
    dataset: str = ""  # identity: datasets/<identity>/

    VOLATILE: ClassVar[frozenset[str]] = frozenset({"git_commit"})
    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"xxh3", "dataset"})
