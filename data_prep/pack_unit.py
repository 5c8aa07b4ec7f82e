"""One unit's documents -> rows of one layout -> pack manifest.

Reads the document shard (page checksums verified), leaves out held-out documents, copies and paragraphs that others keep, packs, writes. A pack is
named by its documents, what was left out and the layout: another sequence length packs again without tokenizing, and a
unit that later versions of the dataset do not touch keeps its pack.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.packing import Packer, Piece, Row
from data_prep.paragraphs.apply import RULE, Cutter
from data_prep.paragraphs.find import read_going
from data_prep.records import PackManifest, UnitManifest, shard_path
from data_prep.rejected import write_copies
from data_prep.resolve import read_duplicates, read_index
from data_prep.tokenize_unit import load_encoder, token_dtype
from data_prep.worker import working
from data_prep.writer import PackedWriter, put, put_packed, token_buffer
from pipeline.arrow import integers
from pipeline.config.schema import DataConfig, DuplicateParagraphs, StorageConfig
from pipeline.integrity import open_checked, read_checked, read_record
from pipeline.manifest import DocumentCounts, FileEntry, TokenizerManifest, digest_of
from pipeline.storage import Storage, open_storage

PACKING_FORMAT = 2  # raise when the same documents and settings would give other rows
LAYOUT_KEYS = ("sequence_length", "packing", "max_documents_per_row", "rows_per_group", "groups_per_file", "zstd_level")


@dataclass(frozen=True)
class PackSettings:
    storage: StorageConfig
    data: DataConfig
    tokenizer: TokenizerManifest
    heldout_hashes: FileEntry | None  # 16-byte hashes, sorted, of all sources; None: no unit is packed, only tails
    keep_rejected: bool = False
    duplicates: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # by source, of its partitions; none: they stay
    across: tuple[str, ...] = ()  # paths of the partitions over all sources; none: copies in other sources stay
    near: str | None = None  # path of the near-duplicates of all units; None: they stay
    paragraphs: tuple[str, ...] = ()  # paths of the ranges of paragraphs that go; none: all stay
    duplicate_paragraphs: DuplicateParagraphs | None = None


@dataclass(frozen=True)
class PackTask:
    """What is a unit's own: of 45,000 tasks each carries no more than it needs."""

    source: str
    unit: str  # path of the unit's manifest
    place: int  # of the unit among its source's, in order of precedence
    units: int
    heldout: tuple[int, ...]  # ordinals chosen for the held-out split
    place_in_all: int = 0  # of the unit among those of all sources
    units_in_all: int = 0


@dataclass(frozen=True)
class _Excluded:
    ordinals: np.ndarray  # int64, sorted: everything left out
    heldout: int
    copies: dict[str, np.ndarray]  # by reason: ordinals


def layout(data: DataConfig) -> dict[str, Any]:
    """What decides the bytes of packed rows: settings, and the version of the packing."""
    return {**data.model_dump(mode="json", include=set(LAYOUT_KEYS)), "format": PACKING_FORMAT}


@working()
def pack_unit(settings: PackSettings, task: PackTask) -> PackManifest:
    """The committed manifest; at once if the pack is done already."""
    storage = open_storage(settings.storage)
    unit = UnitManifest.parse(storage.read(task.unit), storage.uri(task.unit))
    excluded = _excluded(storage, settings, task, unit)
    identity: dict[str, Any] = {
        "unit": unit.id,
        "documents": unit.documents.sha256 if unit.documents else None,
        "excluded": hashlib.sha256(excluded.ordinals.astype("<i8").tobytes()).hexdigest(),
        "heldout": excluded.heldout,
        "layout": layout(settings.data),
        "eos_id": settings.tokenizer.eos_id,
    }
    if len(across := excluded.copies["exact_duplicate_across_sources"]):
        identity["across_sources"] = hashlib.sha256(across.astype("<i8").tobytes()).hexdigest()
    if len(near := excluded.copies["near_duplicate"]):
        identity["near_duplicates"] = hashlib.sha256(near.astype("<i8").tobytes()).hexdigest()
    cutter = _cutter(storage, settings, task, unit, excluded)
    if cutter is not None:
        identity["duplicate_paragraphs"] = hashlib.sha256(cutter.going.tobytes()).hexdigest()
    if settings.keep_rejected:
        identity["keep_rejected"] = True
    pack_id = digest_of(identity)[:32]
    done = read_record(storage, shard_path("packs", pack_id, ".json"), PackManifest)
    if done is not None:
        return done
    data = settings.data
    with tempfile.TemporaryDirectory(prefix="pack-") as folder:
        writer = packed_writer(Path(folder), pack_id, settings)
        text_bytes, too_long = _pack(
            storage,
            unit,
            excluded.ordinals,
            Packer(data.sequence_length, data.packing, data.max_documents_per_row),
            writer,
            cutter,
        )
        writer.close()
        packed = tuple(put_packed(storage, pack_id, file) for file in writer.files)
        rest = put_packed(storage, pack_id, writer.rest) if writer.rest else None
        rejected, emptied = None, cutter.emptied if cutter else []
        named = {
            **excluded.copies,
            RULE: np.array(emptied, np.int64),
            "longer_than_a_row": np.array(too_long, np.int64),
        }
        if settings.keep_rejected and (copies := write_copies(storage, unit, named, Path(folder))).count:
            rejected = put(storage, copies.path, shard_path("rejected", pack_id, ".parquet"))
    found = {name: len(ordinals) for name, ordinals in named.items() if len(ordinals)}
    filtered = {**unit.counts.filtered, **found}
    counts = DocumentCounts(
        docs_in=unit.counts.docs_in,
        docs_out=unit.counts.docs_out - len(excluded.ordinals) - len(emptied) - len(too_long),
        heldout=excluded.heldout,
        filtered=dict(sorted(filtered.items())),
        quarantined=unit.counts.quarantined,
    )
    assert counts.balanced(), f"unit {unit.id}: documents were lost: {counts}"
    manifest = PackManifest(
        id=pack_id,
        unit=unit.id,
        unit_digest=unit.digest,
        packed=packed,
        rest=rest,
        counts=counts,
        padding=writer.padding,
        text_bytes=text_bytes,
        rejected=rejected,
        changes=dict(sorted(cutter.changes.items())) if cutter else {},
    )
    storage.create(manifest.path, manifest.to_json())
    return manifest


def packed_writer(folder: Path, name: str, settings: PackSettings) -> PackedWriter:
    return PackedWriter(
        folder,
        name,
        settings.data.sequence_length,
        token_dtype(settings.tokenizer.vocab_size),
        fill=settings.tokenizer.eos_id,
        rows_per_group=settings.data.rows_per_group,
        groups_per_file=settings.data.groups_per_file,
        zstd_level=settings.data.zstd_level,
    )


def _excluded(storage: Storage, settings: PackSettings, task: PackTask, unit: UnitManifest) -> _Excluded:
    """Held-out documents, then copies of held-out documents (of any source), then of other sources', then within the source,
    then near-duplicates."""
    chosen = np.array(sorted(task.heldout), np.int64)
    copies = np.zeros(0, np.int64)
    if unit.index is not None:
        assert settings.heldout_hashes is not None
        heldout = np.frombuffer(read_checked(storage, settings.heldout_hashes), ">u8").reshape(-1, 2)
        if len(heldout):
            records = read_index(storage, unit.index.path)
            suspects = records[np.isin(records["high"], heldout[:, 0].astype("<u8"))]
            known = {(int(high), int(low)) for high, low in heldout}
            same = [int(record["ordinal"]) for record in suspects if (int(record["high"]), int(record["low"])) in known]
            copies = np.setdiff1d(np.array(same, np.int64), chosen)
    parts = [read_duplicates(storage, path, task.place, task.units) for path in settings.duplicates[task.source]]
    duplicates = np.concatenate([np.zeros(0, np.int64), *parts])
    parts = [read_duplicates(storage, path, task.place_in_all, task.units_in_all) for path in settings.across]
    across = np.concatenate([np.zeros(0, np.int64), *parts])
    across = np.setdiff1d(across, np.concatenate([chosen, copies]))
    duplicates = np.setdiff1d(duplicates, np.concatenate([chosen, copies, across]))
    near = np.zeros(0, np.int64)
    if settings.near is not None:
        near = read_duplicates(storage, settings.near, task.place_in_all, task.units_in_all)
        near = np.setdiff1d(near, np.concatenate([chosen, copies, across, duplicates]))
    ordinals = np.sort(np.concatenate([chosen, copies, across, duplicates, near]))
    reasons = {
        "heldout_copy": copies,
        "exact_duplicate_across_sources": across,
        "exact_duplicate": duplicates,
        "near_duplicate": near,
    }
    return _Excluded(ordinals, len(chosen), reasons)


def _cutter(
    storage: Storage, settings: PackSettings, task: PackTask, unit: UnitManifest, excluded: _Excluded
) -> Cutter | None:
    """What takes paragraphs out of the unit's documents; None where none go."""
    if settings.duplicate_paragraphs is None or unit.paragraphs is None:
        return None
    going = read_going(storage, settings.paragraphs, task.place_in_all, task.units_in_all)
    going = going[~np.isin(going >> np.uint64(32), excluded.ordinals.astype(np.uint64))]
    tokenizer = settings.tokenizer
    load = partial(load_encoder, settings.storage, tokenizer.folder, tokenizer.sha256, unit.engines)
    return Cutter(settings.duplicate_paragraphs, going, load) if len(going) else None


def _pack(
    storage: Storage,
    unit: UnitManifest,
    excluded: np.ndarray,
    packer: Packer,
    writer: PackedWriter,
    cutter: Cutter | None,
) -> tuple[int, list[int]]:
    """Stream the shard through the packer. Returns the text bytes of the documents packed, and the ordinals of those left out because
    they are longer than a row and may not be cut."""
    first, text_bytes, too_long = 0, 0, list[int]()
    held: dict[int, np.ndarray] = {}  # tokens of documents that rows still open refer to
    for tokens, offsets, n_bytes, hashes in windows(storage, unit, writer.dtype):
        count = len(offsets) - 1
        if cutter is not None:
            tokens, offsets, n_bytes = cutter.cut(first, tokens, offsets, n_bytes, hashes.to_pylist())
            excluded = np.union1d(excluded, np.array(cutter.emptied, np.int64))
        lengths = np.diff(offsets) + 1  # EOS
        left_out = excluded[np.searchsorted(excluded, first) : np.searchsorted(excluded, first + count)] - first
        lengths[left_out] = 0
        n_bytes[left_out] = 0
        if packer.method == "whole":
            long = lengths > packer.length
            lengths[long], n_bytes[long] = 0, 0
            too_long += (np.flatnonzero(long) + first).tolist()
        text_bytes += int(n_bytes.sum())
        rows = packer.add(first, lengths.tolist())
        window = _Window(first, tokens, offsets.tolist(), held)
        for row in rows:
            writer.add(_row_tokens(row, window.document), [piece.length for piece in row.pieces])
        held = {number: window.document(number).copy() for number in packer.open_documents}
        first += count
    assert first == unit.counts.docs_out, (
        f"{unit.id}: {first} documents in the shard, {unit.counts.docs_out} in the manifest"
    )
    for row in packer.finish():
        writer.add(_row_tokens(row, held.__getitem__), [piece.length for piece in row.pieces])
    return text_bytes, too_long


@dataclass(frozen=True)
class _Window:
    """Documents first, first + 1, ... of a row group, and earlier ones that open rows hold."""

    first: int
    tokens: np.ndarray
    offsets: list[int]
    held: dict[int, np.ndarray]

    def document(self, number: int) -> np.ndarray:
        if number < self.first:
            return self.held[number]
        return self.tokens[self.offsets[number - self.first] : self.offsets[number - self.first + 1]]


def _row_tokens(row: Row, document: Any) -> Iterator[np.ndarray]:
    """Tokens of each piece; the EOS that ends a document is the writer's fill."""
    piece: Piece
    for piece in row.pieces:
        yield document(piece.document)[piece.start : piece.start + piece.length]


def windows(
    storage: Storage, unit: UnitManifest, dtype: Any
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, pa.Array]]:
    """Row group after row group: tokens, offsets [n + 1], n_bytes [n], hashes [n]."""
    if unit.documents is None:
        return
    with open_checked(storage, unit.documents) as file:
        parquet = pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=True)
        for group in range(parquet.metadata.num_row_groups):
            table = parquet.read_row_group(
                group, columns=["tokens", "n_bytes", "doc_hash"], use_threads=False
            ).combine_chunks()
            if table.num_rows:
                tokens, offsets = token_buffer(table["tokens"].chunk(0), dtype)
                yield tokens, offsets, integers(table["n_bytes"].chunk(0)).copy(), table["doc_hash"].chunk(0)
