"""Tails: the rows of many units' rests, in order, traceable, proven by `verify`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep import tail
from data_prep.prepare import prepare
from pipeline.config.schema import RunConfig
from pipeline.dataset.provenance import documents_of, pack_of
from pipeline.dataset.verify import verify
from pipeline.file_index import open_index
from pipeline.manifest import DatasetManifest
from pipeline.storage import Storage, open_storage

Make = Callable[..., RunConfig]


def read(storage: Storage, path: str) -> list[dict[str, object]]:
    with storage.open(path) as file:
        return pq.read_table(file).to_pylist()


@pytest.fixture
def prepared(jsonl: Path, run_config: Make, monkeypatch: pytest.MonkeyPatch) -> tuple[DatasetManifest, Storage]:
    monkeypatch.setattr(tail, "TAIL_UNITS", 4)
    config = run_config(jsonl, data__rows_per_group=8, data__groups_per_file=1)
    storage = open_storage(config.storage)
    return prepare(config, storage), storage


def test_tails_hold_the_rests_in_order(prepared: tuple[DatasetManifest, Storage]) -> None:
    dataset, storage = prepared
    found = [
        tail.TailManifest.model_validate_json(storage.read(entry.path)) for entry in storage.list("datasets/tails")
    ]
    assert len(found) == 2
    for manifest in found:
        assert 1 <= len(manifest.rests) <= 4
        rests = [row for path, _ in manifest.rests for row in read(storage, path)]
        rows = [row for file in manifest.packed for row in read(storage, file.path)]
        assert len(rows) == len(rests) - manifest.dropped_rows
        assert manifest.dropped_rows < 8
        assert rows == rests[: len(rows)]
        assert set(manifest.packed) <= set(open_index(storage, dataset).packed[0])
    assert dataset.sources[0].dropped_rows == sum(manifest.dropped_rows for manifest in found)


def test_rows_of_a_tail_lead_to_their_documents(prepared: tuple[DatasetManifest, Storage]) -> None:
    dataset, storage = prepared
    manifest = tail.TailManifest.model_validate_json(storage.read(storage.list("datasets/tails")[0].path))
    names = set()
    for file in manifest.packed:
        for number, row in enumerate(read(storage, file.path)):
            tokens = np.frombuffer(row["tokens"], dataset.token_dtype)
            ends = np.cumsum(row["doc_lens"])
            pieces = [tokens[end - length : end] for end, length in zip(ends, row["doc_lens"])]
            for piece in documents_of(storage, pack_of(storage, file, number), pieces, dataset.tokenizer.eos_id):
                assert piece.document is not None
                names.add(piece.document)
    assert len(names) > 3


def test_verify_proves_the_dataset(prepared: tuple[DatasetManifest, Storage]) -> None:
    dataset, storage = prepared
    assert verify(dataset, storage).findings == ()
    (victim,) = [file for file in open_index(storage, dataset).packed[0] if file.path.endswith("-00001.parquet")][:1]
    data = bytearray(storage.read(victim.path))
    data[len(data) // 2] ^= 1
    storage.write(victim.path, bytes(data))
    assert {finding.path for finding in verify(dataset, storage).findings} == {victim.path}
