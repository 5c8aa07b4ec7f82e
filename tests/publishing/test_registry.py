"""The pointer to the promoted version: who may move it, and that concurrent movers lose nothing."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pipeline.config.schema import StorageConfig
from pipeline.manifest import ModelManifest
from pipeline.publishing.registry import commit, find, latest, promote
from pipeline.storage import Storage


def model(step: int, run: str = "a", version: str | None = None, **changes: object) -> ModelManifest:
    fields = {
        "name": "m", "version": version or f"step-{step:08d}-{run}", "files": (), "checkpoint_digest": "c",
        "evaluation_digest": "e", "dataset_digest": "d", "tokenizer_sha256": "t", "run_identity": run, "config": {},
        "git_commit": "unknown", "step": step, "loss": 3.0, "bits_per_byte": 1.0,
    }  # fmt: skip
    return ModelManifest.model_validate(fields | changes)


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return Storage(StorageConfig(root=str(tmp_path)))
    return Storage(request.getfixturevalue("s3_root"))


def test_later_steps_and_other_runs_move_it_forward(storage: Storage):
    assert latest(storage, "m") is None
    versions = [model(40), model(80), model(10, run="b")]
    assert [promote(storage, version) for version in versions] == [True, True, True]
    found = latest(storage, "m")
    assert (found.version, found.step, found.manifest_digest) == (versions[2].version, 10, versions[2].digest)
    assert found.previous == (versions[0].version, versions[1].version)


def test_it_never_moves_back(storage: Storage):
    assert promote(storage, model(80))
    assert not promote(storage, model(40))  # an earlier step of the same run
    assert not promote(storage, model(80))  # the same again
    assert not promote(storage, model(80, version="step-00000080-other"))  # same step, published otherwise
    assert promote(storage, model(20, run="b"))
    assert not promote(storage, model(80))  # a re-run of what was promoted before
    assert promote(storage, model(120))  # but run a may go on
    assert latest(storage, "m").previous == ("step-00000080-a", "step-00000020-b")


def test_concurrent_publishers_of_many_versions_lose_none(storage: Storage):
    versions = [model(step, run=f"run{step}") for step in range(8)]
    gate = threading.Barrier(len(versions))

    def one(version: ModelManifest) -> None:
        own = Storage(storage.config)
        gate.wait()
        assert promote(own, version)

    threads = [threading.Thread(target=one, args=(version,)) for version in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = latest(storage, "m")
    assert sorted((*found.previous, found.version)) == sorted(version.version for version in versions)


def test_concurrent_steps_of_one_run_end_at_the_last(storage: Storage):
    versions = [model(step) for step in range(1, 9)]
    threads = [threading.Thread(target=promote, args=(Storage(storage.config), version)) for version in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = latest(storage, "m")
    assert found.step == 8
    assert list(found.previous) == sorted(found.previous)


def test_commit_is_once_and_refuses_other_content(storage: Storage):
    first = model(40, git_commit="abc")
    assert commit(storage, first) == first
    assert commit(storage, model(40, git_commit="def")) == first  # who made it does not matter, what it is does
    with pytest.raises(ValueError, match="is published with other content"):
        commit(storage, model(40, loss=2.0))
    assert find(storage, "m", first.version) == first
    assert find(storage, "m", "step-00000041-a") is None
