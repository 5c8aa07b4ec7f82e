"""The data as it was prepared, with a look into it: how long documents are, and examples of what was left out."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.file_index import Files, open_index
from pipeline.integrity import DamagedFile
from pipeline.manifest import DatasetManifest, FileEntry, SourceManifest
from pipeline.report import contamination
from pipeline.report.charts import compact, histogram
from pipeline.report.parts import table
from pipeline.storage import Storage

SHARDS = 4  # of a source that are looked into
LINES = 10_000  # of its rejected and quarantined documents
HEAD_BYTES = 1 << 20  # of a list of quarantined documents
LANGUAGES = 8  # of a source that are named
EXCERPT = 160  # letters of an example


@dataclass(frozen=True)
class SourceData:
    """A look into one source. `lengths`: documents by the power of two of their bytes; of `looked` documents."""

    name: str
    lengths: Mapping[int, int] = field(default_factory=dict)
    examples: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # by reason: where, and how the text begins

    @property
    def looked(self) -> int:
        return sum(self.lengths.values())


def look_at_data(storage: Storage, dataset: DatasetManifest) -> list[SourceData]:
    """A few shards of every source, one column of each, and the beginnings of its lists of rejected documents: kilobytes of a
    shard, so that looking costs next to nothing. Raises DamagedFile, which names a file that cannot be read."""
    index = open_index(storage, dataset)
    return [
        SourceData(
            source.name,
            _lengths(storage, index.documents[place]),
            dict(_examples(storage, index.quarantine[place], index.rejected[place])),
        )
        for place, source in enumerate(dataset.sources)
    ]


def _lengths(storage: Storage, shards: Files[FileEntry]) -> dict[int, int]:
    found: Counter[int] = Counter()
    for place in _spread(len(shards)):
        with _parquet(storage, shards[place].path) as parquet:
            sizes = parquet.read(columns=["n_bytes"], use_threads=False)["n_bytes"]
            found.update(max(size, 1).bit_length() - 1 for size in sizes.to_pylist())
    return dict(sorted(found.items()))


def _spread(count: int) -> list[int]:
    """Up to SHARDS places, evenly over all."""
    return sorted({round(k * (count - 1) / max(SHARDS - 1, 1)) for k in range(SHARDS)}) if count else []


def _examples(
    storage: Storage, quarantine: Files[FileEntry], rejected: Files[FileEntry]
) -> Iterator[tuple[str, tuple[str, str]]]:
    """One document a reason, of the first files."""
    seen: set[str] = set()
    rows = itertools.chain(_quarantined(storage, quarantine), _rejected(storage, rejected))
    for reason, location, text in itertools.islice(rows, LINES):
        if reason not in seen:
            seen.add(reason)
            yield reason, (location, " ".join(text.split())[:EXCERPT])


def _quarantined(storage: Storage, files: Files[FileEntry]) -> Iterator[tuple[str, str, str]]:
    for place in range(min(len(files), SHARDS)):
        path = files[place].path
        try:
            lines = storage.read_range(path, 0, HEAD_BYTES).split(b"\n")[:-1]  # the last one may be cut
            for line in lines:
                found = json.loads(line)
                yield found["reason"], str(found["location"]), str(found["excerpt"])
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise DamagedFile(f"{storage.uri(path)}: {error!r}") from None


def _rejected(storage: Storage, files: Files[FileEntry]) -> Iterator[tuple[str, str, str]]:
    for place in range(min(len(files), SHARDS)):
        with _parquet(storage, files[place].path) as parquet:
            for row in parquet.read_row_group(0, use_threads=False).to_pylist():
                yield row["reason"], str(row["location"] or row["doc_id"]), row["text"] or "(a copy)"


@contextlib.contextmanager
def _parquet(storage: Storage, path: str) -> Iterator[pq.ParquetFile]:
    try:
        with storage.open(path) as file:
            yield pq.ParquetFile(file, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise DamagedFile(f"{storage.uri(path)}: {' '.join(str(error).split())}") from None


def data(dataset: DatasetManifest, looks: Sequence[SourceData], shares: Mapping[str, float]) -> str:
    """Tables of the sources and of what was left out, by reason with examples, and histograms of scores and of lengths.

    `shares`: of each source in what was trained on; empty before.
    """
    head = ["source", "share", "documents", "used", "held out", "filtered", "quarantined", "text", "tokens", "rows"]
    rows = [_row(source, shares) for source in dataset.sources]
    left_out = _reasons(dataset, looks) + _scores(dataset)
    return table(head, rows) + left_out + _kept(dataset) + _contamination(dataset) + _lengths_of(looks)


def _row(source: SourceManifest, shares: Mapping[str, float]) -> list[str]:
    counts = source.counts
    return [
        escape(source.name),
        f"{shares[source.name]:.0%}" if source.name in shares else "",
        f"{counts.docs_in:,}",
        f"{counts.docs_out:,}",
        f"{counts.heldout:,}",
        f"{sum(counts.filtered.values()):,}",
        f"{sum(counts.quarantined.values()):,}",
        f"{compact(source.text_bytes)}B",
        compact(source.tokens),
        f"{source.rows:,}",
    ]


def _reasons(dataset: DatasetManifest, looks: Sequence[SourceData]) -> str:
    examples = {look.name: look.examples for look in looks}
    rows = []
    for source in dataset.sources:
        for verb, counts in (("filtered", source.counts.filtered), ("quarantined", source.counts.quarantined)):
            for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
                share = count / max(source.counts.docs_in, 1)
                where, text = examples.get(source.name, {}).get(reason, ("", ""))
                example = f"<code>{escape(where)}</code> {escape(text)}" if where else ""
                rows.append([escape(source.name), verb, escape(reason), example, f"{count:,}", f"{share:.2%}"])
    if not rows:
        return ""
    note = "" if all(row[3] for row in rows) else "Texts that filters reject are kept with corpus.keep_rejected."
    made = table(["source", "", "reason", "for example", "documents", "of the source"], rows, left=4)
    return f"<h3>Left out</h3><div class=wrap>{made}</div><p class='note'>{note}</p>"


def _kept(dataset: DatasetManifest) -> str:
    """What rules changed in documents that stayed, their languages, and clusters of near-duplicates."""
    parts = []
    changes = [
        [escape(source.name), escape(name), f"{count:,}"]
        for source in dataset.sources
        for name, count in sorted(source.changes.items())
    ]
    if changes:
        parts.append(f"<h3>Changed in documents that stay</h3>{table(['source', 'what', 'times'], changes, left=2)}")
    languages = [source for source in dataset.sources if source.languages]
    if languages:
        rows = [_language_row(source) for source in languages]
        parts.append(f"<h3>Languages</h3>{table(['source', 'documents', 'shares'], rows, left=1)}")
    near = dataset.near_duplicates
    if near is not None:
        parts.append(
            f"<h3>Near-duplicates</h3><p>{near.count:,} clusters; {near.dropped:,} documents are left out for another of theirs, copies among "
            "them. <code>moonlight inspect ... duplicates</code> shows the largest.</p>"
        )
    return "".join(parts)


def _language_row(source: SourceManifest) -> list[str]:
    total = sum(source.languages.values())
    most = sorted(source.languages.items(), key=lambda item: (-item[1], item[0]))
    bars = "".join(
        f'<i style="width:{count / total:.2%};background:var(--series-{number % 4})" title="{escape(code)} {count / total:.1%}"></i>'
        for number, (code, count) in enumerate(most[:LANGUAGES])
    )
    words = ", ".join(f"{escape(code)} {count / total:.1%}" for code, count in most[:LANGUAGES])
    return [escape(source.name), f"{total:,}", f'{words}<div class="parts">{bars}</div>']


def _contamination(dataset: DatasetManifest) -> str:
    found = dataset.contamination
    if found is None:
        return ""
    rows = [[escape(cell) for cell in row] for row in contamination.rows(found)]
    note = escape(contamination.sentence(found))
    return f"<h3>Questions of tasks in the corpus</h3>{table(contamination.HEAD, rows)}<p class='note'>{note}</p>"


def _scores(dataset: DatasetManifest) -> str:
    """By a classifier of one's own: of all documents that it saw, those that it left out among them."""
    made = []
    for source in dataset.sources:
        if source.scores is None:
            continue
        bars = [(f"{edge:g}", count) for edge, count in zip(source.scores.edges, source.scores.counts)]
        left_out = sum(
            count for reason, count in source.counts.filtered.items() if reason.partition(".")[0] == "classifier"
        )
        said = f"{sum(source.scores.counts):,} documents, {left_out:,} left out by their score"
        made.append(
            _figure(source.name, said, bars, f"scores of the documents of {source.name}", "score, from this on")
        )
    return f'<h3>Scores of the classifier</h3><div class="charts">{"".join(made)}</div>' if made else ""


def _lengths_of(looks: Sequence[SourceData]) -> str:
    made = []
    for look in looks:
        if not look.lengths:
            continue
        first, last = min(look.lengths), max(look.lengths)
        bars = [(_size(power), look.lengths.get(power, 0)) for power in range(first, last + 1)]
        label, x_title = f"lengths of the documents of {look.name}", "bytes of text, from this power of two on"
        made.append(_figure(look.name, f"{look.looked:,} documents", bars, label, x_title))
    return f'<h3>Lengths of documents</h3><div class="charts">{"".join(made)}</div>' if made else ""


def _figure(name: str, said: str, bars: Sequence[tuple[str, int]], label: str, x_title: str) -> str:
    chart = histogram(bars, label=label, x_title=x_title, y_title="documents", colour="var(--series-0)")
    return f"<figure><figcaption>{escape(name)} <small>{said}</small></figcaption>{chart}</figure>"


def _size(power: int) -> str:
    """10 -> '1 KiB'"""
    unit = min(power // 10, 4)
    return f"{2 ** (power - 10 * unit)} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"
