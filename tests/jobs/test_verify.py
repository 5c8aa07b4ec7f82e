"""`jobs.verify` on a real Ray: sound data, a flipped bit, damaged records."""

import hashlib
import json
import re
from collections.abc import Iterator

import pytest
import ray

from jobs import verify
from pipeline.dataset import verify as in_process
from pipeline.file_index import open_index, write_index
from pipeline.manifest import OWN_DIGEST, digest_of
from tests.jobs.conftest import Prepared


@pytest.fixture
def ray_running() -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20)
    yield
    ray.shutdown()


def test_on_ray(prepared: Prepared, capsys: pytest.CaptureFixture, ray_running: None) -> None:
    dataset, storage = prepared.dataset, prepared.storage
    assert verify.main(prepared.arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"verify: dataset {dataset.identity} is sound: ")
    assert f"{dataset.tokens:,} tokens" in lines[-1]

    entry = open_index(storage, dataset).packed[1][0]
    good = storage.read(entry.path)
    middle = bytearray(good)
    middle[len(good) // 2] ^= 4
    storage.write(entry.path, bytes(middle))
    try:
        assert verify.main(prepared.arguments) == 1
    finally:
        storage.write(entry.path, good)
    out = capsys.readouterr().out
    assert f"verify: DAMAGED {entry.path}: row group " in out
    assert f"dataset {dataset.identity} is NOT sound" in out


def test_damaged_records_are_named(prepared: Prepared) -> None:
    """Records of packs and units: a missing one, one with other counts, a unit that changed, a lost quarantine line."""
    dataset, storage = prepared.dataset, prepared.storage
    pack_path = next(file.path for file in storage.list("datasets/packs") if file.path.endswith(".json"))
    pack = json.loads(storage.read(pack_path))
    unit_path = f"datasets/units/{pack['unit'][:2]}/{pack['unit']}.json"

    def findings() -> list[str]:
        return [str(finding) for finding in in_process.verify(dataset, storage).findings]

    assert findings() == []
    index = open_index(storage, dataset)
    packs = len(index.records)
    one_less = f"datasets/packs: {packs - 1} of the dataset's {packs} packs and tails have their record"
    for path, change, *expected in (
        (pack_path, None, one_less),
        (pack_path, ("padding", -1), one_less, f"{pack_path}: its fields have the sha256 "),
        (unit_path, None, f"{pack_path}: {unit_path} is missing"),
        (unit_path, ("tokens", 1), f"{pack_path}: {unit_path}: its fields have the sha256 "),
    ):
        good = storage.read(path)
        if change is None:
            storage.delete(path)
        else:
            storage.write(path, json.dumps({**json.loads(good), change[0]: change[1]}).encode())
        found = findings()
        storage.write(path, good)
        assert len(found) == len(expected)
        assert all(line.startswith(start) for line, start in zip(found, expected)), found

    tail_path = next(file.path for file in storage.list("datasets/tails"))
    good = storage.read(tail_path)
    tail = {name: value for name, value in json.loads(good).items() if name != OWN_DIGEST}
    changed = {**tail, "dropped_rows": tail["dropped_rows"] + 1}
    kinds = ("packed", "documents", "quarantine")
    indexed = [{kind: list(getattr(index, kind)[s]) for kind in kinds} for s in range(len(dataset.sources))]
    records = {*index.records, digest_of(changed)} - {digest_of(tail)}
    renamed = dataset.model_copy(update={"files": write_index(storage, "datasets/renamed.arrow", indexed, records)})
    storage.write(tail_path, json.dumps(changed).encode())
    found = [str(finding) for finding in in_process.verify(renamed, storage).findings]
    storage.write(tail_path, good)
    assert len(found) == 1
    assert re.fullmatch(
        rf"{tail_path}: \d+ rows went in, \d+ came out and {changed['dropped_rows']} were dropped", found[0]
    )

    quarantine = index.quarantine[0][0]
    good = storage.read(quarantine.path)
    storage.write(quarantine.path, b"")
    found = findings()
    storage.write(quarantine.path, good)
    assert len(found) == 2
    assert any(finding.endswith(f"{quarantine.path} has 0 lines for 1 quarantined records") for finding in found)
    assert f"{quarantine.path}: 0 bytes, expected {quarantine.bytes}" in found
    assert findings() == []


def test_the_manifest_is_made_of_its_files(prepared: Prepared) -> None:
    """What verify relies on, computed here by other means."""
    for files in open_index(prepared.storage, prepared.dataset).packed:
        for file in files:
            data = prepared.storage.read(file.path)
            assert (len(data), hashlib.sha256(data).hexdigest()) == (file.bytes, file.sha256)
