"""dataset.json points at an index of its files: what went in comes out, and nothing damaged is opened."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pipeline.config.schema import StorageConfig
from pipeline.dataset.reader import BlockReader
from pipeline.dataset.verify import verify
from pipeline.file_index import Files, dataset_path, index_path, open_index, read_dataset, write_index
from pipeline.integrity import DamagedFile
from pipeline.manifest import DamagedRecord, FileEntry, PackedFile
from pipeline.storage import Storage, open_storage
from tests.dataset import make


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(StorageConfig(root=str(tmp_path)))


def packed(name: str, groups: int) -> PackedFile:
    return PackedFile(
        path=f"p/{name}", bytes=7 * groups, sha256=f"{groups:064x}", rows=4 * groups, tokens=groups, group_crc32="0a1b2c3d" * (groups + 1)
    )  # fmt: skip


def test_what_went_in_comes_out(storage: Storage) -> None:
    documents = [FileEntry(path=f"d/\u6708{i}", bytes=i, sha256=f"{i:064x}") for i in range(5)]
    sources = [
        {"packed": [packed("a", 1), packed("b", 300)], "quarantine": documents[:1]},
        {},
        {"packed": [packed("c", 2)], "documents": documents},
    ]
    records = [f"{i:064x}" for i in (9, 3, 5)]
    entry = write_index(storage, index_path("x"), sources, records)
    assert entry == write_index(storage, index_path("x"), sources, reversed(records))
    dataset = make.rows_only([8, 8, 8]).model_copy(update={"files": entry})
    index = open_index(storage, dataset)
    for s, files in enumerate(sources):
        assert [list(getattr(index, kind)[s]) for kind in ("packed", "documents", "quarantine")] == [
            files.get(kind, []) for kind in ("packed", "documents", "quarantine")
        ]
    assert index.records == sorted(records)
    some: Files[FileEntry] = index.documents[2]
    assert (len(some), some[-1], some[1:3], some.bytes) == (5, documents[-1], documents[1:3], 10)


def test_a_damaged_index_is_named_and_not_opened(storage: Storage) -> None:
    dataset = make.write(storage, [[2], [1]])
    path, good = dataset.files.path, storage.read(dataset.files.path)
    rng = random.Random(0)
    places = [rng.randrange(8 * len(good)) for _ in range(100)]
    changed = [
        good[: place // 8] + bytes([good[place // 8] ^ 1 << place % 8]) + good[place // 8 + 1 :] for place in places
    ]
    for data in [*changed, good[:-1], good + b"x", b""]:
        storage.write(path, data)
        with pytest.raises(DamagedFile, match=rf"{path}: (sha256 is|\d+ bytes)"):
            open_index(storage, dataset)
    with pytest.raises(DamagedFile, match=path):
        BlockReader(dataset, storage, 0)
    (finding,) = verify(dataset, storage).findings
    assert (finding.path, finding.what) == (path, f"0 bytes, {len(good)} were written")
    storage.delete(path)
    assert [str(found) for found in verify(dataset, storage).findings] == [f"{path}: the file is missing"]


def test_a_dataset_is_handed_on_by_identity_and_digest(storage: Storage) -> None:
    dataset = make.write(storage, [[2], [1]])
    storage.write(dataset_path("test"), dataset.to_json())
    assert read_dataset(storage, "test", dataset.digest) == read_dataset(storage, "test") == dataset
    other = dataset.model_copy(update={"token_dtype": "uint32"})
    storage.write(dataset_path("test"), other.to_json())
    with pytest.raises(DamagedRecord, match=r"datasets/test/dataset.json: its digest is .* replaced meanwhile"):
        read_dataset(storage, "test", dataset.digest)
    storage.write(dataset_path("test"), dataset.to_json().replace(b'"schema_version": 2', b'"schema_version": 1'))
    with pytest.raises(DamagedRecord, match=r"datasets/test/dataset.json: not a sound DatasetManifest"):
        read_dataset(storage, "test")
