"""A corpus with every bad record among good ones: nothing is lost, nothing is fatal, everything is named."""

from __future__ import annotations

import bz2
import gzip
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.mapping import map_in_process
from data_prep.prepare import prepare
from pipeline.config.schema import RunConfig
from pipeline.file_index import open_index
from pipeline.manifest import DatasetManifest
from pipeline.storage import Storage, filesystem, open_storage

Make = Callable[..., RunConfig]
LIMIT = 50_000  # corpus.max_document_bytes


@pytest.fixture
def bad(tmp_path: Path, texts: list[str]) -> Path:
    """70 good documents, 5 that filters reject (2 of them duplicates), 13 bad records."""
    folder = tmp_path / "bad"
    folder.mkdir()
    good = [json.dumps({"text": text}).encode() for text in texts[:40]]
    lines = [
        *good[:10],
        b'{"text": "broken',
        b'{"text": "\xff"}',
        b'{"text": "\\udc00"}',
        b'{"title": "no text"}',
        b'{"text": {"a": 1}}',
        b'{"text": ""}',
        b'{"text": "' + b"x" * LIMIT + b'"}',
        json.dumps({"text": "short"}).encode(),
        json.dumps({"text": "=-" * 500}).encode(),
        json.dumps({"text": "the same line\n" * 50}).encode(),
        *good[10:20],
        *good[:2],
    ]
    (folder / "lines.jsonl").write_bytes(b"\n".join(lines))
    whole = gzip.compress(b"\n".join(good[20:30]) + b"\n")
    (folder / "good.jsonl.gz").write_bytes(whole)
    (folder / "corrupt.jsonl.gz").write_bytes(whole[:-20])
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts[30:60]}), buffer)
    (folder / "good.parquet").write_bytes(buffer.getvalue())
    (folder / "truncated.parquet").write_bytes(buffer.getvalue()[:-100])
    lines = [*(json.dumps({"text": text}).encode() for text in texts[60:70]), b'{"text": ""}', b'{"text": "\xff"}']
    (folder / "more.json.bz2").write_bytes(
        bz2.compress(b"[" + b",\n".join([*lines, b'"' + b"x" * LIMIT + b'"']) + b"]")
    )
    (folder / "README.html").write_text("not a document")
    (folder / "_SUCCESS").touch()
    return folder


def quarantine(storage: Storage, dataset: DatasetManifest) -> list[dict[str, str]]:
    lines = [
        line for entry in open_index(storage, dataset).quarantine[0] for line in storage.read(entry.path).splitlines()
    ]
    return [json.loads(line) for line in lines]


def test_every_record_is_accounted_for(bad: Path, run_config: Make) -> None:
    filters = {"min_characters": 20, "min_alphanumeric_fraction": 0.3, "max_repeated_line_fraction": 0.5}
    config = run_config(bad, source={"filters": filters}, corpus__max_document_bytes=LIMIT, corpus__unit_bytes=100_000)
    storage = open_storage(config.storage)
    dataset = prepare(config, storage)
    counts = dataset.sources[0].counts
    quarantined = {
        "invalid_json": 1,
        "invalid_utf8": 2,
        "lone_surrogates": 1,
        "missing_field": 1,
        "non_string_field": 1,
        "empty_document": 2,
        "too_large": 2,
        "corrupt_file": 2,
    }
    filtered = {
        "min_characters": 1,
        "min_alphanumeric_fraction": 1,
        "max_repeated_line_fraction": 1,
        "exact_duplicate": 2,
    }
    # the corrupt gzip breaks off within its first chunk: its documents are lost with it, as one record
    assert counts.quarantined == quarantined
    assert counts.heldout > 0
    copies = counts.filtered.get("exact_duplicate", 0) + counts.filtered.get("heldout_copy", 0)
    assert copies == 2
    assert {name: count for name, count in counts.filtered.items() if "cop" not in name and "dup" not in name} == {
        name: count for name, count in filtered.items() if name != "exact_duplicate"
    }
    assert counts.docs_out + counts.heldout == 70
    assert counts.docs_in == 70 + 5 + sum(quarantined.values())
    assert counts.balanced()
    records = quarantine(storage, dataset)
    assert Counter(record["reason"] for record in records) == quarantined
    places = {record["location"].split("@")[0]: record["reason"] for record in records}
    assert places["corrupt.jsonl.gz"] == places["truncated.parquet#0"] == "corrupt_file"
    assert places["more.json.bz2"] == "too_large"
    lines = (bad / "lines.jsonl").read_bytes()
    (location,) = (record["location"] for record in records if record["reason"] == "lone_surrogates")
    assert lines[int(location.split("@")[1]) :].startswith(b'{"text": "\\udc00"}')


def test_counts_hold_per_unit(bad: Path, run_config: Make) -> None:
    config = run_config(bad, corpus__max_document_bytes=LIMIT, corpus__unit_bytes=50_000)
    storage = open_storage(config.storage)
    dataset = prepare(config, storage)
    packs = [json.loads(storage.read(entry.path)) for entry in storage.list("datasets/packs")]
    assert len(packs) > 3
    for pack in packs:
        counts = pack["counts"]
        rejected = sum(counts["filtered"].values()) + sum(counts["quarantined"].values())
        assert counts["docs_in"] == counts["docs_out"] + counts["heldout"] + rejected
    for key in ("docs_in", "docs_out", "heldout"):
        assert sum(pack["counts"][key] for pack in packs) == getattr(dataset.sources[0].counts, key)


def test_an_object_that_is_replaced_under_the_run(bucket: tuple[str, str], texts: list[str], run_config: Make) -> None:
    """By one of the same size: its etag tells."""
    endpoint, name = bucket
    config = run_config(f"s3://{name}/texts", storage__endpoint_url=endpoint, source={"format": "jsonl"})
    fs = filesystem("s3://", config.storage)
    data = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts[:40])
    fs.pipe_file(f"{name}/texts/a.jsonl", data)

    def meddling(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        fs.pipe_file(f"{name}/texts/a.jsonl", data.replace(b"import", b"IMPORT"))
        yield from map_in_process(function, items)

    with pytest.raises(RuntimeError, match=r"a\.jsonl is not the file that was listed any more"):
        prepare(config, open_storage(config.storage), map_units=meddling)


def test_a_given_tokenizer_is_used(bad: Path, tmp_path: Path, run_config: Make) -> None:
    trained = run_config(bad)
    first = prepare(trained, open_storage(trained.storage))
    folder = Path(trained.storage.root) / first.tokenizer.folder
    config = run_config(bad, tokenizer=json.dumps({"path": str(folder)}), storage__root=str(tmp_path / "second"))
    second = prepare(config, open_storage(config.storage))
    assert second.tokenizer.sha256 == first.tokenizer.sha256
    there, here = open_storage(config.storage), open_storage(trained.storage)
    assert [*open_index(there, second).documents[0]] == [*open_index(here, first).documents[0]]
    rank_file = run_config(
        bad,
        tokenizer=json.dumps({"path": str(folder / "tiktoken.model")}),
        storage__root=str(tmp_path / "third"),
        model__vocab_size=1000,
    )
    third = prepare(rank_file, open_storage(rank_file.storage))
    assert third.tokenizer.special_tokens["[EOS]"] == 597
    assert third.tokenizer.vocab_size == 596 + 256
    assert third.sources[0].tokens == first.sources[0].tokens
