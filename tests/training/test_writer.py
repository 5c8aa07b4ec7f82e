"""Two trainers on one run: one trains. A holder that was taken for dead commits nothing."""

import json
import threading

import pytest

from pipeline.lease import Held, LeaseLost, acquire, give_way, hold
from pipeline.storage import Storage
from pipeline.training import checkpoint
from pipeline.training.commits import commit, committed, lease_path, manifest_path, parts_folder, read_manifest
from pipeline.training.trainer import TrainingStopped
from pipeline.training.writer import sole_writer
from tests.distributed import run_distributed
from tests.training.make import Watched, tiny, tiny_dataset
from tests.training.test_resume import stop_after


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(tiny(str(tmp_path)).storage)


def held_by_another(root: str) -> None:
    watched = Watched()
    with pytest.raises(Held, match="run tiny is being written by"):
        watched.train(tiny(root, parallelism={"shard": 2, "ep": 2}))
    assert watched.progress == []


@pytest.mark.parametrize("world", [1, 2])
def test_a_second_trainer_leaves(tmp_path, storage, world):
    tiny_dataset(storage)
    with hold(storage, lease_path("tiny"), what="run tiny", beat_s=1.0) as held:
        if world == 1:
            with pytest.raises(Held, match="run tiny is being written by"):
                Watched().train(tiny(str(tmp_path)))
        else:
            run_distributed(held_by_another, 2, str(tmp_path))
        held.check()
    assert list(committed(storage, "tiny")) == []
    assert Watched().train(tiny(str(tmp_path))).steps == 4


def test_who_lost_the_lease_commits_nothing(tmp_path, storage):
    """It is taken over in its third step, and finds out when it wants to save."""
    reference = Watched().train(tiny(str(tmp_path / "undisturbed"), steps=6))
    seen = Watched()

    def taken_over() -> bool:
        if len(seen.progress) == 2:
            give_way(storage, lease_path("tiny"))
        return False

    with pytest.raises(LeaseLost, match="nothing more is written"):
        seen.train(tiny(str(tmp_path), steps=6), should_stop=taken_over)
    assert [manifest.step for manifest in committed(storage, "tiny")] == [2]
    again = Watched().train(tiny(str(tmp_path), steps=6))
    assert again.digest == reference.digest
    assert [manifest.fence for manifest in committed(storage, "tiny")] == [1, 3, 3]  # 2 told the first to give way


def _kept(storage):
    """What a run goes on from. A journal tells what an attempt did, the last lines of a late one, too: each has a file of its own."""
    there = [info.path for info in storage.list("runs/tiny/train")]
    return {path: storage.read(path) for path in there if "/journal/" not in path}


def test_a_late_writer_leaves_the_next_ones_checkpoint_alone(tmp_path, storage, monkeypatch):
    """A holder is suspended just before it would commit; another one trains the run to its end; the first one wakes."""
    suspended, wake = threading.Event(), threading.Event()
    original = checkpoint.Checkpointer._commit

    def sleepy(self, *arguments):
        if self._facts.fence == 1:
            suspended.set()
            assert wake.wait(120)
        return original(self, *arguments)

    monkeypatch.setattr(checkpoint.Checkpointer, "_commit", sleepy)
    errors: list[BaseException] = []

    def first() -> None:
        try:
            Watched().train(tiny(str(tmp_path)))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    assert suspended.wait(120)
    assert give_way(storage, lease_path("tiny")) is not None
    whole = Watched().train(tiny(str(tmp_path)))
    before = _kept(storage)
    wake.set()
    thread.join(120)
    assert [type(error) for error in errors] == [LeaseLost]
    assert _kept(storage) == before
    assert whole.checkpoint.fence == 3


def test_a_checkpoint_of_an_earlier_writer_gives_way(tmp_path, storage):
    """Suspended between its last look at the lease and its commit, it may still commit: the next one's counts."""
    manifest = Watched().train(tiny(str(tmp_path))).checkpoint
    late = manifest.model_copy(update={"fence": 0})
    storage.delete(manifest_path("tiny", 4))
    commit(storage, late)
    commit(storage, manifest)
    assert read_manifest(storage, "tiny", 4) == manifest
    with pytest.raises(ValueError, match="another writer has committed this step"):
        commit(storage, late)
    assert read_manifest(storage, "tiny", 4) == manifest


def test_numbers_go_on_when_the_record_was_deleted(tmp_path, storage):
    with pytest.raises(TrainingStopped):
        Watched().train(tiny(str(tmp_path), steps=8), should_stop=stop_after(2))
    storage.delete(lease_path("tiny"))
    with sole_writer(storage, "tiny") as writer:
        assert writer.number == 2
    assert parts_folder("tiny", 2, 2) != parts_folder("tiny", 2, 1)


def test_a_restarted_group_need_not_wait(tmp_path, storage):
    record = acquire(storage, lease_path("tiny"), what="run tiny", owner="driver 7")
    storage.write(lease_path("tiny"), record.model_copy(update={"process": "other-boot pid:[1] 7 99"}).to_json())
    with sole_writer(storage, "tiny", owner="driver 7") as writer:
        assert writer.number == 2
    assert json.loads(storage.read(lease_path("tiny")))["released"]
