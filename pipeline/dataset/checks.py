"""The checks of one file of a dataset. What is wrong is reported, not raised, and nothing is repaired.

packed     rows and row groups as announced; tokens below the vocabulary's size; document lengths positive and within the
           row; EOS at the ends of documents only; a piece without EOS (a long document goes on elsewhere) fills its row to
           the end; padding is EOS; token count as announced; no held-out document (leakage.py)
held-out   no EOS, tokens below the vocabulary's size, positive byte counts, totals as announced
search     what was found over all sources: clusters of near-duplicates as many as announced, one document left out a pair;
           of every task as many seen questions as announced
others     size and SHA-256 (tokenizer, document shards, quarantine, rejected documents)
records    of the packs and tails that the dataset names by digest: document counts balanced, the unit's record as it was,
           the files that later steps and versions read of it (indexes of hashes, held-out candidates, signatures, questions seen),
           packed files those of the dataset, no row lost in a tail, one quarantine line per quarantined record,
           of rejected documents that are kept one row for each that was counted

A packed file is read once, row group by row group: SHA-256 of the whole, CRC-32 of each part, decoding, invariants. A
finding names the row group where there is one. Memory: one row group.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.leakage import HeldoutIndex
from pipeline.dataset.packed_file import Block, CorruptBlock, Layout, fetch_range, read_footer, read_group
from pipeline.file_index import FileIndex, Files
from pipeline.manifest import (
    PACK_OPTIONAL,
    UNIT_OPTIONAL,
    DatasetManifest,
    DocumentCounts,
    FileEntry,
    HeldoutFile,
    PackedFile,
    digest_of,
    fields_of,
)
from pipeline.storage import Storage

PACKS, TAILS = "datasets/packs", "datasets/tails"  # where data_prep commits them: <first two digits>/<id>.json


UNIT_FILES = ("index", "candidates", "bands", "seen", "paragraphs")  # of a unit's record


@dataclass(frozen=True)
class Finding:
    """Something that is not as the manifest says."""

    path: str
    row_group: int | None  # None: the file as a whole, or its footer
    what: str

    def __str__(self) -> str:
        place = self.path if self.row_group is None else f"{self.path}: row group {self.row_group}"
        return f"{place}: {self.what}"


@dataclass(frozen=True)
class Task:
    """One file to check: `source` and `index` find it in the manifest (source -1: the tokenizer's, one of `searched`, or all records whose
    name begins with the hexadecimal digit `index`)."""

    kind: Literal["packed", "heldout", "documents", "quarantine", "rejected", "tokenizer", "records", "search"]
    source: int
    index: int


@dataclass
class FileReport:
    task: Task
    path: str
    bytes: int = 0
    rows: int = 0
    tokens: int = 0
    documents: int = 0  # packed: that end here; held-out: all; records: that went in
    records: int = 0
    text_bytes: int = 0
    findings: list[Finding] = field(default_factory=list)


def check(
    dataset: DatasetManifest, index: FileIndex, heldout: HeldoutIndex, storage: Storage, task: Task
) -> FileReport:
    """Check one file; what is wrong is in the report, not raised."""
    if task.kind == "records":
        return _check_records(index, storage, task)
    entry = _entry(dataset, index, task)
    report = FileReport(task, entry.path)
    try:
        if isinstance(entry, PackedFile):
            _check_packed(dataset, heldout, storage, entry, report)
        elif isinstance(entry, HeldoutFile):
            _check_heldout(dataset, storage, entry, report)
        elif _check_bytes(storage, entry, report) and task.kind == "search":
            report.findings += [Finding(entry.path, None, what) for what in _check_search(dataset, storage, entry)]
    except FileNotFoundError:
        report.findings.append(Finding(entry.path, None, "the file is missing"))
    return report


def check_block(block: Block, eos_id: int, vocab_size: int) -> tuple[str, int]:
    """What is wrong with the rows of a block ('' if nothing), and how many documents end in it. No loop over tokens."""
    tokens, lengths = block.tokens, block.lengths.astype(np.int64)
    rows, row_tokens = tokens.shape
    row_of = np.repeat(np.arange(rows), np.diff(block.offsets))
    used = np.bincount(row_of, weights=lengths, minlength=rows).astype(np.int64)
    if (lengths <= 0).any():
        return f"row {row_of[np.argmax(lengths <= 0)]}: a document of {lengths.min()} tokens", 0
    if (used > row_tokens).any():
        return f"row {np.argmax(used > row_tokens)}: documents of {used.max()} tokens in a row of {row_tokens}", 0
    last = np.cumsum(lengths) - (np.cumsum(used) - used)[row_of] - 1  # column of each document's last token
    is_end = np.zeros(tokens.shape, dtype=bool)
    is_end[row_of, last] = True
    padding = np.arange(row_tokens) >= used[:, None]
    is_eos = tokens == eos_id
    unfinished = is_end & ~is_eos
    unfinished[:, -1] = False  # a document that goes on in another row fills this one
    for wrong, what in (
        (tokens >= vocab_size, f"token {tokens.max()} is outside the vocabulary of {vocab_size}"),
        (is_eos & ~is_end & ~padding, "EOS inside a document"),
        (padding & ~is_eos, "padding that is not EOS"),
        (unfinished, "a document ends without EOS"),
    ):
        if wrong.any():
            return f"row {np.argmax(wrong.any(axis=1))}: {what}", 0
    return "", int((is_end & is_eos).sum())


# -- files -------------------------------------------------------------------------------------------------------


def _entry(dataset: DatasetManifest, index: FileIndex, task: Task) -> FileEntry:
    if task.kind == "tokenizer":
        return dataset.tokenizer.files[task.index]
    if task.kind == "search":
        return searched(dataset)[task.index]
    if task.kind == "heldout":
        return dataset.sources[task.source].heldout[task.index]
    files: Sequence[FileEntry] = getattr(index, task.kind)[task.source]
    return files[task.index]


def searched(dataset: DatasetManifest) -> list[FileEntry]:
    """The files that say what was found over all sources."""
    near, found = dataset.near_duplicates, dataset.contamination
    return ([near.duplicates, near.clusters] if near else []) + ([found.questions, found.seen] if found else [])


def _check_search(dataset: DatasetManifest, storage: Storage, entry: FileEntry) -> Iterator[str]:
    """What is wrong with a file whose bytes are those on record."""
    near, found = dataset.near_duplicates, dataset.contamination
    if near is not None and entry == near.clusters:
        pairs = np.frombuffer(storage.read(entry.path), "<u8").reshape(-1, 2)
        if len(pairs) != near.dropped or len(np.unique(pairs[:, 1])) != near.dropped:
            yield f"{len(pairs)} documents are left out, the manifest says {near.dropped}"
    elif found is not None and entry == found.seen:
        seen = pq.read_table(io.BytesIO(storage.read(entry.path)))["task"].to_pylist()
        for name, task in found.tasks.items():
            if seen.count(name) != task.seen:
                yield f"{seen.count(name)} questions of {name} were seen, the manifest says {task.seen}"


def _check_bytes(storage: Storage, entry: FileEntry, report: FileReport) -> bool:
    """Size and SHA-256 of the whole file."""
    digest, size = hashlib.sha256(), 0
    for chunk in _chunks(storage, entry.path):
        digest.update(chunk)
        size += len(chunk)
    report.bytes = size
    if size != entry.bytes:
        report.findings.append(Finding(entry.path, None, f"{size} bytes, expected {entry.bytes}"))
    elif digest.hexdigest() != entry.sha256:
        report.findings.append(Finding(entry.path, None, f"SHA-256 is {digest.hexdigest()}, expected {entry.sha256}"))
    return not report.findings


def _check_packed(
    dataset: DatasetManifest, heldout: HeldoutIndex, storage: Storage, entry: PackedFile, report: FileReport
) -> None:
    layout, digest = Layout.of(dataset), hashlib.sha256()

    def fetch(start: int, stop: int) -> bytes:
        return fetch_range(storage, entry, start, stop)

    try:
        footer = read_footer(fetch, entry, layout)
    except CorruptBlock as error:
        report.findings.append(Finding(entry.path, None, f"footer: {error.what}"))
        return
    for group in range(footer.metadata.num_row_groups):
        try:
            block, data = read_group(fetch, entry, layout, footer, group)
        except CorruptBlock as error:
            report.findings.append(Finding(entry.path, group, error.what))
            continue
        digest.update(data)
        problem, ended = check_block(block, dataset.tokenizer.eos_id, dataset.tokenizer.vocab_size)
        problem = problem or heldout.find(block)
        if problem:
            report.findings.append(Finding(entry.path, group, problem))
        report.rows += len(block.tokens)
        report.tokens += int(block.lengths.sum())
        report.documents += ended
    digest.update(fetch(footer.bounds[-1], entry.bytes))
    report.bytes = entry.bytes
    if report.findings:
        return
    if digest.hexdigest() != entry.sha256:
        report.findings.append(Finding(entry.path, None, f"SHA-256 is {digest.hexdigest()}, expected {entry.sha256}"))
    if report.tokens != entry.tokens:
        report.findings.append(Finding(entry.path, None, f"{report.tokens} tokens, the manifest says {entry.tokens}"))


def _check_heldout(dataset: DatasetManifest, storage: Storage, entry: HeldoutFile, report: FileReport) -> None:
    if not _check_bytes(storage, entry, report):
        return
    width = np.dtype(dataset.token_dtype).itemsize
    try:
        file = pq.ParquetFile(io.BytesIO(storage.read(entry.path)), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        report.findings.append(Finding(entry.path, None, str(error)))
        return
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=["tokens", "n_bytes"], use_threads=False)
        tokens = np.frombuffer(b"".join(table.column("tokens").to_pylist()), dtype=f"<u{width}")
        n_bytes = table.column("n_bytes").to_numpy()
        report.documents += len(table)
        report.tokens += len(tokens)
        report.text_bytes += int(n_bytes.sum())
        if len(tokens) and int(tokens.max()) >= dataset.tokenizer.vocab_size:
            report.findings.append(Finding(entry.path, group, f"token {tokens.max()} is outside the vocabulary"))
        if (tokens == dataset.tokenizer.eos_id).any():
            report.findings.append(Finding(entry.path, group, "a held-out document contains EOS"))
        if len(n_bytes) and n_bytes.min() <= 0:
            report.findings.append(Finding(entry.path, group, f"a held-out document of {n_bytes.min()} bytes"))
    for name in ("documents", "tokens", "text_bytes"):
        if getattr(report, name) != getattr(entry, name):
            what = f"{getattr(report, name)} {name}, the manifest says {getattr(entry, name)}"
            report.findings.append(Finding(entry.path, None, what))


def _check_records(index: FileIndex, storage: Storage, task: Task) -> FileReport:
    report = FileReport(task, f"{PACKS}/{task.index:x}*")
    named = set(index.records)
    ours = {path: (files, i) for files in index.packed for i, path in enumerate(files.table["path"].to_pylist())}
    for folder in (PACKS, TAILS):
        for second in range(16):
            for found in storage.list(f"{folder}/{task.index:x}{second:x}"):
                data = storage.read(found.path)
                report.bytes += len(data)
                try:
                    record = fields_of(data)
                except ValueError as error:
                    report.findings.append(Finding(found.path, None, str(error)))
                    continue
                if (
                    _digest_without(record, PACK_OPTIONAL) in named
                ):  # else of another dataset; a damaged one is missing from the total
                    report.records += 1
                    report.rows += sum(file["rows"] for file in record["packed"])
                    problems = list(_foreign_files(record, ours))
                    if folder == PACKS:
                        report.documents += record["counts"]["docs_in"]
                        problems += _check_pack(storage, record)
                    else:
                        problems += _check_tail(record)
                    report.findings += [Finding(found.path, None, what) for what in problems]
    return report


def _foreign_files(record: dict[str, Any], ours: dict[str, tuple[Files[PackedFile], int]]) -> Iterator[str]:
    for file in record["packed"]:
        files, i = ours.get(file["path"], (None, 0))
        if files is None or files[i] != PackedFile(**file):
            yield f"{file['path']} is not among the dataset's files"


def _check_tail(tail: dict[str, Any]) -> Iterator[str]:
    rows = sum(rows for _, rows in tail["rests"])
    kept = sum(file["rows"] for file in tail["packed"])
    if rows != kept + tail["dropped_rows"]:
        yield f"{rows} rows went in, {kept} came out and {tail['dropped_rows']} were dropped"


def _check_pack(storage: Storage, pack: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the record of a pack, and with that of its unit."""
    if not DocumentCounts(**pack["counts"]).balanced():
        yield f"document counts do not balance: {pack['counts']}"
    path = f"datasets/units/{pack['unit'][:2]}/{pack['unit']}.json"
    data = storage.read_or_none(path)
    if data is None:
        yield f"{path} is missing"
        return
    try:
        unit = fields_of(data)
    except ValueError as error:
        yield f"{path}: {error}"
        return
    yield from _check_rejected(storage, pack, unit)
    for name in UNIT_FILES:
        if unit.get(name):
            yield from _check_file(storage, FileEntry(**unit[name]))
    digest = _digest_without(unit, UNIT_OPTIONAL)
    if digest != pack["unit_digest"]:
        yield f"{path} has digest {digest}, expected {pack['unit_digest']}"
    elif unit["quarantine"] and not unit["failed"]:
        lines = (storage.read_or_none(unit["quarantine"]["path"]) or b"").count(b"\n")
        records = sum(unit["counts"]["quarantined"].values())
        if lines != records:
            yield f"{unit['quarantine']['path']} has {lines} lines for {records} quarantined records"


def _digest_without(record: dict[str, Any], optional: frozenset[str]) -> str:
    """Of a record's fields but for those of `optional` that are empty."""
    return digest_of({name: value for name, value in record.items() if value or name not in optional})


def _check_file(storage: Storage, entry: FileEntry) -> Iterator[str]:
    """Of a unit, that no list of the dataset's files names."""
    report = FileReport(Task("records", -1, 0), entry.path)
    try:
        _check_bytes(storage, entry, report)
    except FileNotFoundError:
        yield f"{entry.path}: the file is missing"
    yield from (f"{entry.path}: {finding.what}" for finding in report.findings)


def _check_rejected(storage: Storage, pack: dict[str, Any], unit: dict[str, Any]) -> Iterator[str]:
    """Of a unit what filters rejected, of its pack the copies besides."""
    by_filters = sum(unit["counts"]["filtered"].values())
    copies = sum(pack["counts"]["filtered"].values()) - by_filters
    for record, counted in ((unit, by_filters), (pack, copies)):
        if record["rejected"] is not None:
            path = record["rejected"]["path"]
            try:
                with storage.open(path) as file:
                    rows = pq.ParquetFile(file).metadata.num_rows
            except (FileNotFoundError, pa.ArrowInvalid):
                continue  # found by the check of the file itself
            if rows != counted:
                yield f"{path} has {rows} rows for {counted} rejected documents"


def _chunks(storage: Storage, path: str, size: int = 8 << 20) -> Iterator[bytes]:
    with storage.open(path) as file:
        while chunk := file.read(size):
            yield chunk
