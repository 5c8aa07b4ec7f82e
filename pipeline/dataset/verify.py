"""Proof that a dataset in storage is the one its manifest describes: every checksum, every count, every invariant.

One check per file, independent of all others, so that they can run anywhere in parallel (`jobs/verify.py` gives them to
Ray); `summarize` then compares the totals. A check reads its file once as a stream (size, SHA-256, CRC-32 of each row
group and of the footer) and decodes it block by block:

packed     rows and row groups as announced; tokens below the vocabulary's size; document lengths positive and within the
           row; EOS at the ends of documents only; a piece without EOS (a long document goes on elsewhere) fills its row to
           the end; padding is EOS; token count as announced
held-out   no EOS, tokens below the vocabulary's size, positive byte counts, totals as announced
others     size and SHA-256

A finding names the file and, where there is one, the row group. Nothing is repaired. Cost: the bytes of the dataset once;
about 0.3 CPU-seconds per 100 M tokens; memory of one file's row group.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.packed_file import Block, CorruptBlock, Layout, fetch_range, read_footer, read_group
from pipeline.manifest import DatasetManifest, FileEntry, HeldoutFile, PackedFile
from pipeline.storage import Storage


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
    """One file to check: `source` and `index` find it in the manifest (source -1: the tokenizer)."""

    kind: Literal["packed", "heldout", "documents", "tokenizer"]
    source: int
    index: int


@dataclass
class FileReport:
    task: Task
    path: str
    bytes: int = 0
    rows: int = 0
    tokens: int = 0
    documents: int = 0  # packed: documents that end here; held-out: all
    text_bytes: int = 0
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class VerifyReport:
    files: int
    bytes: int
    rows: int
    tokens: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}


def tasks_of(dataset: DatasetManifest) -> list[Task]:
    tasks = [Task("tokenizer", -1, index) for index in range(len(dataset.tokenizer.files))]
    for s, source in enumerate(dataset.sources):
        tasks += [Task("packed", s, index) for index in range(len(source.packed))]
        tasks += [Task("heldout", s, index) for index in range(len(source.heldout))]
        tasks += [Task("documents", s, index) for index in range(len(source.documents))]
    return tasks


def verify(
    dataset: DatasetManifest,
    storage: Storage,
    *,
    map_tasks: Callable[[Callable[[Task], FileReport], list[Task]], Iterable[FileReport]] = map,
    report: Callable[[int, int, FileReport], None] = lambda done, total, file: None,
) -> VerifyReport:
    """Check everything. `map_tasks` runs the checks, in any order; `report(done, total, file)` is called as they end."""
    tasks = tasks_of(dataset)
    reports = []
    for file in map_tasks(lambda task: check(dataset, storage, task), tasks):
        reports.append(file)
        report(len(reports), len(tasks), file)
    return summarize(dataset, reports)


def check(dataset: DatasetManifest, storage: Storage, task: Task) -> FileReport:
    """Check one file; what is wrong is in the report, not raised."""
    entry = _entry(dataset, task)
    report = FileReport(task, entry.path)
    try:
        if isinstance(entry, PackedFile):
            _check_packed(dataset, storage, entry, report)
        elif isinstance(entry, HeldoutFile):
            _check_heldout(dataset, storage, entry, report)
        else:
            _check_bytes(storage, entry, report)
    except FileNotFoundError:
        report.findings.append(Finding(entry.path, None, "the file is missing"))
    return report


def summarize(dataset: DatasetManifest, reports: list[FileReport]) -> VerifyReport:
    """Findings of all files, and the totals that no single file can show."""
    findings = [finding for report in reports for finding in report.findings]
    for s, source in enumerate(dataset.sources):
        mine = [report for report in reports if report.task.source == s]
        if any(report.findings for report in mine):
            continue  # totals of damaged files say nothing new
        packed = [report for report in mine if report.task.kind == "packed"]
        heldout = [report for report in mine if report.task.kind == "heldout"]
        expected = {
            "rows": (source.rows, sum(report.rows for report in packed)),
            "tokens": (source.tokens, sum(report.tokens for report in packed)),
            "held-out documents": (source.counts.heldout, sum(report.documents for report in heldout)),
        }
        for name, (announced, found) in expected.items():
            if announced != found:
                findings.append(
                    Finding(f"source {source.name}", None, f"{found} {name}, the manifest says {announced}")
                )
        ended = sum(report.documents for report in packed)
        if ended > source.counts.docs_out:
            findings.append(
                Finding(
                    f"source {source.name}",
                    None,
                    f"{ended} documents end in packed rows, {source.counts.docs_out} were put in",
                )
            )
        if not source.counts.balanced():
            findings.append(
                Finding(f"source {source.name}", None, f"document counts do not balance: {source.counts.model_dump()}")
            )
    return VerifyReport(
        files=len(reports),
        bytes=sum(report.bytes for report in reports),
        rows=sum(report.rows for report in reports),
        tokens=sum(report.tokens for report in reports if report.task.kind == "packed"),
        findings=tuple(sorted(findings, key=lambda finding: (finding.path, finding.row_group or -1, finding.what))),
    )


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


def _entry(dataset: DatasetManifest, task: Task) -> FileEntry:
    if task.kind == "tokenizer":
        return dataset.tokenizer.files[task.index]
    files: tuple[FileEntry, ...] = getattr(dataset.sources[task.source], task.kind)
    return files[task.index]


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


def _check_packed(dataset: DatasetManifest, storage: Storage, entry: PackedFile, report: FileReport) -> None:
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


def _chunks(storage: Storage, path: str, size: int = 8 << 20) -> Iterator[bytes]:
    with storage.open(path) as file:
        while chunk := file.read(size):
            yield chunk
