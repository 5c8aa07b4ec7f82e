"""Flips in what prepare leaves for its later steps, for training and for the next version of a corpus: each is named with its file."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from data_prep import pack_unit, tail
from data_prep.dataset_plan import read_units
from data_prep.identity import list_corpus
from data_prep.prepare import prepare
from data_prep.records import PackManifest, Plan, TailManifest, UnitManifest, shard_path
from data_prep.resolve import choose_heldout, read_duplicates, read_index
from data_prep.tokenizer_stage import find_tokenizer
from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig, StorageConfig
from pipeline.dataset.order import Order
from pipeline.dataset.provenance import sequences
from pipeline.dataset.reader import BlockId, BlockReader
from pipeline.file_index import open_index, read_dataset
from pipeline.integrity import DamagedFile, open_checked, read_record
from pipeline.manifest import DamagedRecord, DatasetManifest, FileEntry
from pipeline.storage import Storage, open_storage
from tests.flips import check_flips, is_blank


class Made(NamedTuple):
    config: RunConfig
    storage: Storage
    dataset: DatasetManifest
    unit: UnitManifest  # one that has held-out candidates and copies of others' documents
    plan: Plan

    def only(self, pattern: str) -> Path:
        """The file of that name; of several one that holds something."""
        return max(Path(self.storage.root).glob(pattern), key=lambda path: path.stat().st_size)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Made:
    """Two sources, every third document a copy of another."""
    folder = tmp_path_factory.mktemp("made")
    sources = []
    for number in range(2):
        (folder / f"s{number}").mkdir()
        some = [text[:1500] for text in texts[number * 20 : number * 20 + 20]]
        for part in range(2):
            lines = [json.dumps({"text": text}) for text in [*some[part * 10 : part * 10 + 10], *some[:5]]]
            (folder / f"s{number}" / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
        sources.append({"name": f"s{number}", "path": str(folder / f"s{number}")})
    corpus = {"sources": sources, "unit_bytes": 12_000, "heldout_fraction": 0.2, "drop_duplicates_across_sources": True}
    settings = {
        "storage.root": folder / "root",
        "tokenizer": json.dumps({"vocab_size": 400, "training_bytes": 50_000}),
        "model.vocab_size": 400,
        "corpus": json.dumps(corpus),
        "data.sequence_length": 256,
        "data.rows_per_group": 4,
        "data.max_padding": 1.0,
        "data.lanes": 2,
        "training.sequence_length": 256,
        "schedule.total_tokens": 16384,
    }
    config = load_config("debug", [f"{key}={value}" for key, value in settings.items()])
    storage = open_storage(config.storage)
    dataset = prepare(config, storage)
    manifests = [UnitManifest.parse(storage.read(entry.path), entry.path) for entry in storage.list("datasets/units")]
    path = f"datasets/plans/{dataset.identity}.json"
    unit = next(unit for unit in manifests if unit.candidates)
    return Made(config, storage, dataset, unit, Plan.parse(storage.read(path), path))


@pytest.fixture(params=[6, pytest.param(300, marks=pytest.mark.long)])
def count(request: pytest.FixtureRequest) -> int:
    return request.param


def record(kind: Any, folder: str) -> tuple[str, Callable[[Made], object], Any]:
    """A record's file below datasets/<folder>, read as each stage reads it."""

    def read(made: Made) -> object:
        path = made.only(f"datasets/{folder}")
        return read_record(made.storage, str(path.relative_to(made.storage.root)), kind)

    return f"datasets/{folder}", read, is_blank


def nothing(data: bytes, byte: int) -> bool:
    return False


def blocks(made: Made) -> None:
    reader = BlockReader(made.dataset, made.storage, 0)
    try:
        for s, source in enumerate(made.dataset.sources):
            reader.get([BlockId(s, number) for number in range(source.rows // made.dataset.rows_per_group)])
    finally:
        reader.close()


def duplicates(made: Made) -> None:
    """Of every unit, as the unit's pack reads them."""
    units = made.plan.count
    for place in range(units):
        read_duplicates(made.storage, relative(made, "datasets/*/resolved/_across-*.duplicates"), place, units)


def documents(made: Made) -> None:
    for _ in pack_unit.windows(made.storage, made.unit, np.dtype(made.dataset.token_dtype)):
        pass


def rest(made: Made) -> None:
    name = made.only("datasets/packed/*/*-rest.parquet").name.removesuffix("-rest.parquet")
    pack = read_record(made.storage, shard_path("packs", name, ".json"), PackManifest)
    assert pack is not None
    assert pack.rest is not None
    for _ in tail._rows(made.storage, [pack.rest], np.dtype(made.dataset.token_dtype)):
        pass


def candidates(made: Made) -> object:
    return choose_heldout(made.storage, "s0", [made.unit], [0], 5, made.plan.tokenizer)


def index(made: Made) -> None:
    """In parts, as partitions do."""
    assert made.unit.index is not None
    for low, high in ((0, 100), (100, 256)):
        read_index(made.storage, made.unit.index.path, low, high)


def tokenizer(made: Made) -> object:
    return find_tokenizer(made.config, made.storage, list_corpus(made.config))


def relative(made: Made, pattern: str) -> str:
    return str(made.only(pattern).relative_to(made.storage.root))


KINDS: dict[str, tuple[str, Callable[[Made], object], Any]] = {
    "packed rows": ("datasets/packed/*/*-00000.parquet", blocks, nothing),
    "dataset.json": (
        "datasets/*/dataset.json",
        lambda made: read_dataset(made.storage, made.dataset.identity),
        is_blank,
    ),
    "files.arrow": ("datasets/*/files.arrow", lambda made: open_index(made.storage, made.dataset), nothing),
    "unit": record(UnitManifest, "units/*/*.json"),
    "pack": record(PackManifest, "packs/*/*.json"),
    "tail": record(TailManifest, "tails/*/*.json"),
    "plan": record(Plan, "plans/*.json"),
    "units of a plan": ("datasets/plans/*.units", lambda made: read_units(made.storage, made.plan), nothing),
    "tokenizer manifest": ("tokenizers/*/manifest.json", tokenizer, is_blank),
    "tokenizer training.json": ("tokenizers/*/training.json", tokenizer, is_blank),
    "documents": ("{unit.documents}", documents, nothing),
    "index": ("{unit.index}", index, nothing),
    "candidates": ("{unit.candidates}", candidates, nothing),
    "rest": ("datasets/packed/*/*-rest.parquet", rest, nothing),
    "duplicates": ("datasets/*/resolved/_across-*.duplicates", duplicates, nothing),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_flip_is_named(made: Made, count: int, kind: str) -> None:
    pattern, read, harmless = KINDS[kind]
    if pattern.startswith("{"):
        pattern = getattr(made.unit, pattern[6:-1]).path
    said = check_flips(made.only(pattern), lambda: read(made), count, harmless)
    if kind == "packed rows":
        assert all("row group" in line or "footer" in line for line in said)


def test_a_checked_file_on_s3_is_fetched_once_and_checked(s3_root: StorageConfig) -> None:
    storage = open_storage(s3_root)
    data = bytes(range(256)) * 100
    storage.write("a", data)
    entry = FileEntry(path="a", bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    with open_checked(storage, entry) as file:
        assert file.read() == data
    storage.write("a", data[:-1] + b"x")
    with pytest.raises(DamagedFile, match=r"/a: sha256 is .*, written as"), open_checked(storage, entry):
        pass
    storage.delete("a")
    with pytest.raises(DamagedFile, match=r"/a: the file is missing"), open_checked(storage, entry):
        pass


def test_where_a_sequence_comes_from_is_not_told_by_a_damaged_record(made: Made, tmp_path: Path) -> None:
    """`jobs.inspect` reads records of packs and units."""
    shutil.copytree(made.storage.root, tmp_path / "root")
    storage = open_storage(made.storage.config.model_copy(update={"root": str(tmp_path / "root")}))
    for path in (tmp_path / "root" / "datasets" / "units").rglob("*.json"):
        path.write_bytes(path.read_bytes()[:-100])
    order = Order.of_run(made.config, made.dataset)
    with pytest.raises(DamagedRecord, match=r"/datasets/units/.*\.json: "):
        list(sequences(order, storage, range(4)))
