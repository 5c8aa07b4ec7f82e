"""Twenty processes move one pointer at once: one history, in which every move is there once and begins where another ended."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import StorageConfig
from pipeline.publishing.registry import Latest, before_current, latest, move, promote
from pipeline.storage import Storage
from tests.publishing.test_registry import model

MOVERS = 20


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return Storage(StorageConfig(root=str(tmp_path)))
    return Storage(request.getfixturevalue("s3_root"))


def one(config: dict[str, Any], environment: dict[str, str], number: int, ready: Any) -> None:
    """A process of its own: every third one is a person who rolls back to where the pointer is first. The server of forks may have
    started before there were credentials for S3."""
    os.environ.update(environment)
    storage = Storage(StorageConfig.model_validate(config))
    ready.wait()
    if number % 3:
        assert promote(storage, model(number, run=f"run{number}"))
    else:
        move(storage, model(0, run="first"), "rollback", f"person {number}")


def test_racing_promotions_leave_one_consistent_history(storage: Storage):
    assert promote(storage, model(0, run="first"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # twenty imports cost a minute
    ready = context.Barrier(MOVERS)
    config = storage.config.model_dump()
    processes = [
        context.Process(target=one, args=(config, dict(os.environ), number, ready)) for number in range(1, MOVERS + 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * MOVERS
    found = latest(storage, "m")
    assert found is not None
    consistent(found)
    promoted = [move.version for move in found.history if move.action == "promote"]
    numbers = [number for number in range(1, MOVERS + 1) if number % 3]
    first = model(0, run="first").version
    assert sorted(promoted) == sorted([first, *(model(n, run=f"run{n}").version for n in numbers)])
    rollbacks = [move for move in found.history if move.action == "rollback"]
    assert len({move.because for move in rollbacks}) == len(rollbacks)


def consistent(found: Latest) -> None:
    pointer = ""
    for step in found.history:
        assert step.before == pointer
        assert step.version != pointer
        pointer = step.version
    assert found.version == pointer
    assert sorted((*found.previous, found.version)) == sorted({step.version for step in found.history})


def test_a_rollback_restores_what_was_there_and_is_not_undone_by_a_re_run(storage: Storage):
    a, b, c = model(10, run="a"), model(10, run="b"), model(10, run="c")
    for version in (a, b, c):
        assert promote(storage, version)
    found = latest(storage, "m")
    assert found is not None
    assert before_current(found) == b.version
    assert move(storage, b, "rollback", "c writes nonsense")
    found = latest(storage, "m")
    assert found is not None
    assert (found.version, found.manifest_digest, found.loss) == (b.version, b.digest, b.loss)
    assert not promote(storage, c)  # a restarted publisher
    assert before_current(found) == a.version  # once more goes on back
    assert move(storage, a, "rollback", "")
    assert not move(storage, a, "rollback", "")
    assert promote(storage, model(20, run="c"))  # a later step of that run may come
    found = latest(storage, "m")
    assert found is not None
    consistent(found)
    assert [(step.action, step.because) for step in found.history[3:5]] == [
        ("rollback", "c writes nonsense"),
        ("rollback", ""),
    ]
    assert before_current(found) == c.version


def test_a_pointer_of_before_there_was_a_history_is_read_and_gets_one(storage: Storage):
    old = Latest(
        version="v2", manifest_digest="d", run_identity="a", step=2, loss=3.0, bits_per_byte=1.0, previous=("v0", "v1")
    )  # fmt: skip
    storage.write("models/m/latest.json", old.to_json())
    assert before_current(old) == "v1"
    assert promote(storage, model(3))
    found = latest(storage, "m")
    assert found is not None
    assert found.previous == ("v0", "v1", "v2")
    assert [(step.before, step.version) for step in found.history] == [("v2", model(3).version)]


def test_what_is_asked_sees_the_pointer_that_it_would_replace(storage: Storage):
    """A gate that compares with the promoted model must not be answered about the one before it."""
    assert promote(storage, model(1, run="a"))
    seen: list[str] = []

    def allowed() -> None:
        current = latest(storage, "m")
        assert current is not None
        seen.append(current.version)
        if len(seen) == 1:  # somebody is faster, just after we looked
            assert promote(Storage(storage.config), model(1, run="b"))

    assert promote(storage, model(1, run="c"), allowed)
    assert seen == ["step-00000001-a", "step-00000001-b"]
