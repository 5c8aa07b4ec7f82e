"""Proof that a dataset in storage is the one its manifest describes: every checksum, every count, every invariant.

One task per file (checks.py), independent of all others, so that they can run anywhere in parallel (`jobs/on_ray/verify.py`
gives them to Ray); `summarize` then compares the totals that no single file can show. Cost: the bytes of the dataset
read once, and a few CPU-seconds per billion tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.dataset.checks import PACKS, FileReport, Finding, Task, check, searched
from pipeline.dataset.leakage import HeldoutIndex, heldout_index
from pipeline.file_index import FileIndex, open_index
from pipeline.integrity import DamagedFile
from pipeline.manifest import DatasetManifest, FileEntry
from pipeline.storage import Storage

FILE_KINDS: tuple[Literal["packed", "heldout", "documents", "quarantine", "rejected"], ...] = (
    "packed",
    "heldout",
    "documents",
    "quarantine",
    "rejected",
)


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


MapTasks = Callable[[DatasetManifest, FileIndex, HeldoutIndex, Storage, list[Task]], Iterable[FileReport]]


def in_process(
    dataset: DatasetManifest, index: FileIndex, heldout: HeldoutIndex, storage: Storage, tasks: list[Task]
) -> Iterator[FileReport]:
    for task in tasks:
        yield check(dataset, index, heldout, storage, task)


def tasks_of(dataset: DatasetManifest, index: FileIndex) -> list[Task]:
    tasks = [Task("tokenizer", -1, number) for number in range(len(dataset.tokenizer.files))]
    tasks += [Task("search", -1, number) for number in range(len(searched(dataset)))]
    if index.records:
        tasks += [Task("records", -1, digit) for digit in range(16)]
    for s, source in enumerate(dataset.sources):
        for kind in FILE_KINDS:
            files: Sequence[FileEntry] = source.heldout if kind == "heldout" else getattr(index, kind)[s]
            tasks += [Task(kind, s, number) for number in range(len(files))]
    return tasks


def verify(
    dataset: DatasetManifest,
    storage: Storage,
    *,
    map_tasks: MapTasks = in_process,
    report: Callable[[int, int, FileReport], None] = lambda done, total, file: None,
) -> VerifyReport:
    """Check everything. `map_tasks` runs the checks, in any order; `report(done, total, file)` is called as they end."""
    try:
        index = open_index(storage, dataset)
    except DamagedFile as error:
        what = str(error).removeprefix(f"{storage.uri(dataset.files.path)}: ")
        return VerifyReport(1, 0, 0, 0, (Finding(dataset.files.path, None, what),))
    tasks, reports = tasks_of(dataset, index), []
    for file in map_tasks(dataset, index, heldout_index(dataset, storage), storage, tasks):
        reports.append(file)
        report(len(reports), len(tasks), file)
    return summarize(dataset, index, reports)


def summarize(dataset: DatasetManifest, index: FileIndex, reports: list[FileReport]) -> VerifyReport:
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
    records = [report for report in reports if report.task.kind == "records"]
    found = sum(report.records for report in records)
    if found != len(index.records):
        what = f"{found} of the dataset's {len(index.records)} packs and tails have their record"
        findings.append(Finding(PACKS, None, what))
    elif records:
        for name, announced, found in (
            ("documents", sum(source.counts.docs_in for source in dataset.sources), sum(r.documents for r in records)),
            ("rows", dataset.rows, sum(report.rows for report in records)),
        ):
            if announced != found:
                findings.append(Finding(PACKS, None, f"{found} {name} on record, the manifest says {announced}"))
    return VerifyReport(
        files=sum(report.task.kind != "records" for report in reports),
        bytes=sum(report.bytes for report in reports),
        rows=sum(report.rows for report in reports if report.task.kind == "packed"),
        tokens=sum(report.tokens for report in reports if report.task.kind == "packed"),
        findings=tuple(sorted(findings, key=lambda finding: (finding.path, finding.row_group or -1, finding.what))),
    )
