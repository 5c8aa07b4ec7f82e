"""What the steps of prepare hand to each other, and where it lies in storage.

```
datasets/plans/<identity>-<digest>.units  units of a dataset version
datasets/plans/<identity>.json            commit of the former, and the version's tokenizer
datasets/documents/ab/<unit>.parquet      a unit's tokenized documents: tokens, doc_hash, n_bytes, doc_id
datasets/documents/ab/<unit>.index        (hash, ordinal) of each, sorted: what finding duplicates reads
datasets/documents/ab/<unit>.bands        MinHash signatures, where near-duplicates are looked for
datasets/documents/ab/<unit>.parts        hashes of paragraphs or lines, where those of several documents are looked for
datasets/documents/ab/<unit>.seen         questions of the evaluation's tasks that are in it, where they are looked for
datasets/questions/ab/<sha256>.parquet    these questions
datasets/documents/ab/<unit>.heldout.parquet   the unit's candidates for the held-out split
datasets/quarantine/ab/<unit>.jsonl       records that could not be used: location, reason, excerpt
datasets/rejected/ab/<unit>.parquet       on request: documents that filters rejected, with the reason and the text
datasets/rejected/ab/<pack>.parquet       on request: documents of the unit that are copies, with the reason
datasets/units/ab/<unit>.json             commit of the above
datasets/lengths/ab/<documents>-<length>.long  documents of a unit that fit into no row of that length, where that decides who stays
datasets/packed/ab/<pack>-00000.parquet   packed rows of a unit
datasets/packed/ab/<pack>-rest.parquet    its last rows, short of a whole group
datasets/packs/ab/<pack>.json             commit of the packed rows
datasets/packed/ab/<tail>-00000.parquet   rests of many units, in whole groups
datasets/tails/ab/<tail>.json             commit of these
datasets/heldout/<source>-<digest>.parquet
datasets/<identity>/files.arrow           the files of the dataset version and the digests of their records
datasets/<identity>/dataset.json          commit of the dataset version: a few kilobytes that name the former
```
Units and packs are named by their content's identity and shared between dataset versions. `ab` are the first two hex
digits: on S3 each is a prefix with its own request rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.manifest import (
    PACK_OPTIONAL,
    UNIT_OPTIONAL,
    DocumentCounts,
    FileEntry,
    Histogram,
    PackedFile,
    Record,
    TokenizerManifest,
)


def shard_path(kind: str, name: str, suffix: str) -> str:
    return f"datasets/{kind}/{name[:2]}/{name}{suffix}"


def units_path(identity: str, sha256: str) -> str:
    return f"datasets/plans/{identity}-{sha256[:16]}.units"


def lease_path(identity: str) -> str:
    """Of the record that says who prepares the dataset (pipeline/lease.py)."""
    return f"datasets/{identity}/writer.json"


def plan_path(identity: str) -> str:
    return f"datasets/plans/{identity}.json"


class UnitManifest(Record):
    """A unit's documents are tokenized. counts.docs_out are the documents in the shard: duplicates and held-out are still among them."""

    id: str
    source: str
    slices: tuple[dict[str, Any], ...]
    settings: dict[str, Any]
    counts: DocumentCounts
    tokens: int
    text_bytes: int
    documents: FileEntry | None
    index: FileEntry | None
    candidates: FileEntry | None
    quarantine: FileEntry | None
    rejected: FileEntry | None = None
    cross_checked: int  # documents encoded by the reference too, with equal ids
    engines: tuple[
        str, ...
    ] = ()  # that encoded it: the tokenizer's, or the reference where one of these gave other ids
    failed: str = ""  # not empty: why the whole unit is in quarantine
    bands: FileEntry | None = None  # signatures, where near-duplicates are looked for (near/file.py)
    paragraphs: FileEntry | None = None  # where those of several documents are looked for (paragraphs/parts.py)
    changes: dict[str, int] = {}  # made to documents that were kept, by name: c4.lines, personal_data.email
    languages: dict[str, int] = {}  # documents that were kept, by language, where it was asked for
    examples: dict[str, tuple[str, ...]] = {}  # locations of the first documents that each rule dropped or cut
    contaminated: dict[str, int] = {}  # documents with questions, by task, where these are looked for
    seen: FileEntry | None = None  # questions that were found (contamination/seen.py)
    scores: Histogram | None = None  # of a classifier, of all documents that it saw
    versions: dict[str, str]

    OPTIONAL: ClassVar[frozenset[str]] = UNIT_OPTIONAL

    @property
    def path(self) -> str:
        return shard_path("units", self.id, ".json")


class PackManifest(Record):
    """A unit's rows of one layout. counts are final: docs_in = docs_out + heldout + filtered + quarantined."""

    id: str
    unit: str
    unit_digest: str
    packed: tuple[PackedFile, ...]
    rest: PackedFile | None  # the last rows, short of a whole group: for the tail
    counts: DocumentCounts
    padding: int  # tokens
    text_bytes: int
    rejected: FileEntry | None = None
    changes: dict[str, int] = {}  # made to its documents for what others say, by name: duplicate_paragraphs.lines

    OPTIONAL: ClassVar[frozenset[str]] = PACK_OPTIONAL

    @property
    def path(self) -> str:
        return shard_path("packs", self.id, ".json")

    @property
    def sequence_length(self) -> int | None:
        """Of its rows; None if it has none."""
        files = [*self.packed, *([self.rest] if self.rest else [])]
        rows = sum(file.rows for file in files)
        return (sum(file.tokens for file in files) + self.padding) // rows if rows else None


class TailManifest(Record):
    """The rests of up to 512 units, in whole groups. What still is short of one is dropped."""

    id: str
    rests: tuple[tuple[str, int], ...]  # path and rows of each, in order
    packed: tuple[PackedFile, ...]
    dropped_rows: int
    dropped_tokens: int

    @property
    def path(self) -> str:
        return shard_path("tails", self.id, ".json")


class Plan(Record):
    """`datasets/plans/<identity>.json`: written once, so that every run and restart of a dataset works on the same units."""

    identity: str
    tokenizer: TokenizerManifest
    units: FileEntry  # units.py
    count: int  # of units


@dataclass(frozen=True)
class PrepareProgress:
    """Where prepare stands. Documents, bytes, tokens and their rates are those of this run; units also of earlier ones."""

    phase: str  # tokenizer, tokenize, resolve, bands, clusters, paragraphs, pack, tail, packed
    units_done: int
    units_total: int
    units_failed: int
    documents: int
    text_bytes: int
    tokens: int
    seconds: float  # of this phase
    units_before: int = 0  # done when this run began
    padding: float | None = None  # share of the dataset's slots, once it is packed

    @property
    def megabytes_per_second(self) -> float:
        return _rate(self.text_bytes / 1e6, self.seconds)

    @property
    def tokens_per_second(self) -> float:
        return _rate(self.tokens, self.seconds)

    @property
    def eta_seconds(self) -> float | None:
        """Of this phase, None before the first unit."""
        here = self.units_done - self.units_before
        return self.seconds / here * (self.units_total - self.units_done) if here else None

    def line(self) -> str:
        eta = "" if self.eta_seconds is None else f", {self.eta_seconds:.0f} s left"
        failed = f", {self.units_failed} failed" if self.units_failed else ""
        if self.padding is not None:
            return f"{self.phase}: {self.tokens / 1e6:,.2f} M tokens, {self.padding:.2%} padding{failed}"
        return (
            f"{self.phase}: {self.units_done}/{self.units_total} units{failed}, {self.documents:,} documents, "
            f"{self.text_bytes / 1e6:,.1f} MB ({self.megabytes_per_second:.1f} MB/s), {self.tokens / 1e6:,.2f} M tokens "
            f"({self.tokens_per_second / 1e6:.2f} M/s){eta}"
        )


def _rate(done: float, seconds: float) -> float:
    """0 where next to no time was measured: the last line of a phase, or one that had nothing to do."""
    return done / seconds if seconds >= 1e-3 else 0.0


Report = Callable[[PrepareProgress], None]
