"""A corpus of every format: the counts of each source are exact, copies go by the order of sources, rejected ones are kept."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.prepare import prepare
from pipeline.config.schema import RunConfig
from pipeline.dataset.verify import verify
from pipeline.file_index import open_index
from pipeline.storage import Storage, open_storage

Make = Callable[..., RunConfig]


def _rows(texts: list[str], first: int) -> list[dict[str, Any]]:
    """Documents, and of each kind of trouble one: null, empty, not wanted, too short, the first again."""
    rows = [{"text": text, "id": first + number, "score": 0.9, "lang": "en"} for number, text in enumerate(texts)]
    more: list[dict[str, Any]] = [
        {"text": None, "score": 0.9, "lang": "en"},
        {"text": "", "score": 0.9, "lang": "en"},
        {"text": f"{first}: a document of low score", "score": 0.1, "lang": "en"},
        {"text": f"{first}: ein Dokument", "score": 0.9, "lang": "de"},
        {"text": "short", "score": 0.9, "lang": "en"},
    ]
    return [
        *rows,
        *({**row, "id": first + 500 + number} for number, row in enumerate(more)),
        {**rows[0], "id": first + 900},
    ]


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return b"\n".join(json.dumps(row).encode() for row in rows) + b"\n"


def _delimited(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def _table(rows: list[dict[str, Any]], kind: pa.DataType) -> pa.Table:
    table = pa.Table.from_pylist(rows)
    return table.set_column(0, "text", table["text"].cast(kind))


def _parquet(rows: list[dict[str, Any]], kind: pa.DataType) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(_table(rows, kind), buffer)
    return buffer.getvalue()


def _stream(rows: list[dict[str, Any]], kind: pa.DataType) -> bytes:
    buffer = io.BytesIO()
    table = _table(rows, kind)
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


def _feather(rows: list[dict[str, Any]], kind: pa.DataType) -> bytes:
    buffer = io.BytesIO()
    feather.write_feather(_table(rows, kind), buffer)
    return buffer.getvalue()


FILES: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.jsonl": _lines,
    "b.jsonl.gz": lambda rows: gzip.compress(_lines(rows)),
    "c.jsonl.zst": lambda rows: zstandard.compress(_lines(rows)),
    "d.ndjson.bz2": lambda rows: bz2.compress(_lines(rows)),
    "e.json.xz": lambda rows: lzma.compress(json.dumps(rows).encode()),
    "f.json": lambda rows: json.dumps(rows, indent=2).encode(),
    "g.parquet": lambda rows: _parquet(rows, pa.string()),
    "h.parquet": lambda rows: _parquet(rows, pa.string_view()),
    "i.parquet": lambda rows: _parquet(rows, pa.dictionary(pa.int32(), pa.large_string())),
    "j.parquet": lambda rows: _parquet(rows, pa.large_binary()),
    "k.arrow": lambda rows: _stream(rows, pa.string()),
    "l.feather": lambda rows: _feather(rows, pa.string_view()),
}
DELIMITED = {"m.csv": ",", "n.tsv": "\t"}  # these know no null
EACH = 4


@pytest.fixture
def corpus(tmp_path: Path, texts: list[str]) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    names = [*FILES, *DELIMITED]
    for place, name in enumerate(names):
        rows = _rows(texts[place * EACH : place * EACH + EACH], place * 1000)
        data = FILES[name](rows) if name in FILES else _delimited(rows, DELIMITED[name])
        (folder / name).write_bytes(data)
    for name in ("README.html", "_SUCCESS", "README.md", "checksums.md5"):
        (folder / name).write_text("not a document")
    other = tmp_path / "other"
    other.mkdir()
    for number, text in enumerate([*texts[:6], *texts[100:104], texts[100]]):
        (other / f"{number}.txt").write_text(text)
    return tmp_path


def _config(corpus: Path, run_config: Make, **changes: Any) -> RunConfig:
    where = ["score > 0.5", 'lang == "en"']
    main = {
        "name": "main",
        "path": str(corpus / "corpus"),
        "id_field": "id",
        "filters": {"min_characters": 10, "where": where},
    }
    sources = [main, {"name": "other", "path": str(corpus / "other")}]
    return run_config(corpus / "corpus", corpus__sources=json.dumps(sources), **changes)


def _expected() -> tuple[dict[str, int], dict[str, int]]:
    files = len(FILES) + len(DELIMITED)
    filtered = {"score > 0.5": files, 'lang == "en"': files, "min_characters": files}
    return filtered, {"null_field": len(FILES), "empty_document": files + len(DELIMITED)}


def _rejected(storage: Storage) -> list[dict[str, Any]]:
    rows = []
    for entry in storage.list("datasets/rejected"):
        with storage.open(entry.path) as file:
            rows += pq.read_table(file).to_pylist()
    return rows


@pytest.mark.parametrize("across", [False, True])
def test_counts_are_exact(corpus: Path, texts: list[str], run_config: Make, across: bool) -> None:
    options = {"corpus__drop_duplicates_across_sources": str(across).lower(), "corpus__keep_rejected": "true"}
    config = _config(corpus, run_config, **options)
    storage = open_storage(config.storage)
    dataset = prepare(config, storage)
    main, other = (source.counts for source in dataset.sources)
    files = len(FILES) + len(DELIMITED)
    filtered, quarantined = _expected()
    assert main.docs_in == files * (EACH + 6)
    assert main.quarantined == quarantined
    copies = main.filtered.get("heldout_copy", 0) + main.filtered["exact_duplicate"]
    assert {name: count for name, count in main.filtered.items() if name in filtered} == filtered
    assert main.docs_out + main.heldout + copies == files * (EACH + 1)
    assert "exact_duplicate_across_sources" not in main.filtered
    assert other.docs_in == 11
    found = Counter(other.filtered)
    gone = 6 if across else 0
    assert (
        found["exact_duplicate_across_sources"] + found["heldout_copy"] + found["exact_duplicate"] + other.heldout
        >= gone + 1
    )
    assert found["exact_duplicate_across_sources"] == (
        0 if not across else 6 - sum(_is_heldout(storage, dataset, number) for number in range(6))
    )
    assert main.balanced()
    assert other.balanced()
    assert verify(dataset, storage).findings == ()
    rejected = _rejected(storage)
    index = open_index(storage, dataset)
    kept = {file.path for files in index.rejected for file in files}
    assert kept == {entry.path for entry in storage.list("datasets/rejected")}
    victim = min(kept)
    storage.delete(victim)
    assert {finding.path for finding in verify(dataset, storage).findings} == {victim}
    assert Counter(row["reason"] for row in rejected) == Counter(main.filtered) + found
    for row in rejected:
        if row["text"] is None:
            assert row["reason"] in ("heldout_copy", "exact_duplicate", "exact_duplicate_across_sources")
        elif row["reason"] == "score > 0.5":
            assert row["text"].endswith("a document of low score")
            assert row["text"].startswith(f"{int(row['doc_id']) // 1000 * 1000}: ")


def _is_heldout(storage: Storage, dataset: Any, number: int) -> bool:
    """Whether a copy of the document with that number in `other` is held out, in either source."""
    names = {f"{number}.txt", str(number // EACH * 1000 + number % EACH)}
    if number % EACH == 0:
        names.add(str(number // EACH * 1000 + 900))
    for source in dataset.sources:
        for entry in source.heldout:
            with storage.open(entry.path) as file:
                if names & set(pq.read_table(file)["doc_id"].to_pylist()):
                    return True
    return False


def test_the_source_named_first_keeps_its_documents(corpus: Path, run_config: Make) -> None:
    """Whatever is named first, and whether or not it drops copies of its own."""
    options = {"corpus__drop_duplicates_across_sources": "true", "corpus__heldout_fraction": "0.0"}
    config = _config(corpus, run_config, **options)
    assert prepare(config, open_storage(config.storage)).sources[1].counts.filtered == {
        "exact_duplicate": 1,
        "exact_duplicate_across_sources": 6,
    }
    sources = [source.model_dump(mode="json") for source in reversed(config.corpus.sources)]
    sources[0]["filters"]["drop_exact_duplicates"] = sources[1]["filters"]["drop_exact_duplicates"] = False
    turned = run_config(corpus, corpus__sources=json.dumps(sources), **options)
    other, main = (source.counts for source in prepare(turned, open_storage(turned.storage)).sources)
    assert other.filtered == {}
    assert main.filtered["exact_duplicate_across_sources"] == 6 + 2  # two of the six are in their files twice
    assert "exact_duplicate" not in main.filtered
    nothing_kept = open_storage(config.storage).list("datasets/rejected")
    assert nothing_kept == []
