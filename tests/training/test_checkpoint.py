"""Checkpoints as objects: when they exist, whose they are, what is kept, and refusals that say what to do."""

import dataclasses
import gc
import hashlib
import json
import os
import threading

import psutil
import pytest
import torch
import xxhash

from pipeline.storage import Storage
from pipeline.training import content
from pipeline.training.checkpoint import load_state
from pipeline.training.commits import ForeignCheckpoint, committed, parts_folder, step_folder
from pipeline.training.trainer import Run
from tests.training.make import Watched, tiny, tiny_dataset


def steps(root) -> list[int]:
    return [manifest.step for manifest in committed(Storage(tiny(str(root)).storage), "tiny")]


def test_another_configuration_is_refused_by_name(tmp_path):
    Watched().train(tiny(str(tmp_path)))
    with pytest.raises(
        ForeignCheckpoint, match=r"optimizer.weight_decay is 0.3 here and 0.1 there. Choose another run_id"
    ):
        Watched().train(tiny(str(tmp_path), optimizer__weight_decay=0.3))


def test_only_the_newest_are_kept(tmp_path):
    Watched().train(tiny(str(tmp_path), steps=8, checkpoint__keep=2))
    assert steps(tmp_path) == [6, 8]
    storage = Storage(tiny(str(tmp_path)).storage)
    assert storage.list(step_folder("tiny", 4)) == []


def test_without_a_manifest_it_does_not_exist(tmp_path):
    """A save that was cut off leaves files and no manifest: not loaded, and cleared before the folder is used again."""
    config = tiny(str(tmp_path))
    reference = Watched().train(config)
    storage = Storage(config.storage)
    storage.delete(f"{step_folder('tiny', 4)}/manifest.json")
    left = f"{parts_folder('tiny', 4, reference.checkpoint.fence)}/__7_0.distcp"
    storage.write(left, b"by a larger world")
    watched = Watched()
    again = watched.train(config)
    assert [progress.step for progress in watched.progress] == [3, 4]
    assert again.digest == reference.digest
    assert not storage.exists(left)


def test_asynchronous_saves_are_the_same_bytes(tmp_path):
    """The next steps change the live tensors while the thread writes: it must write what it was given."""
    saved = {}
    for asynchronous in (False, True):
        config = tiny(
            str(tmp_path / str(asynchronous)), steps=8, checkpoint__async_save=asynchronous, checkpoint__keep=9
        )
        watched = Watched()
        watched.train(config)
        saved[asynchronous] = watched.checkpoints
    assert [manifest.step for manifest in saved[True]] == [2, 4, 6, 8]
    assert saved[True] == saved[False]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_save_fails_the_run(tmp_path, monkeypatch, asynchronous):
    create = Storage.create

    def full(self, path, data):
        if path.endswith("manifest.json"):
            raise OSError("disk full")
        return create(self, path, data)

    monkeypatch.setattr(Storage, "create", full)
    with pytest.raises(OSError, match="disk full"):
        Watched().train(tiny(str(tmp_path), checkpoint__async_save=asynchronous))
    assert steps(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("norm.weight"), r"norm.weight \(16,\) is not a tensor of this run"),
        (lambda state: state.update(extra=torch.zeros(3)), r"extra is missing; expected shape \(3,\)"),
        (
            lambda state: state.update({"norm.weight": torch.zeros(17)}),
            r"norm.weight has shape \(16,\), expected \(17,\); check the model section",
        ),
    ],
)
def test_tensors_that_do_not_match_are_named(tmp_path, change, message):
    config = tiny(str(tmp_path), steps=2)
    manifest = Watched().train(config)
    storage = Storage(config.storage)
    run = Run(config, tiny_dataset(storage), storage)
    state = run.state()
    run.close()
    change(state)
    with pytest.raises(ValueError, match=message):
        load_state(state, storage, manifest.checkpoint, None)


def test_the_manifest_vouches_for_every_file(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "BLOCK", 100)  # several a piece
    config = tiny(str(tmp_path), steps=2)
    watched = Watched()
    manifest = watched.train(config).checkpoint
    storage = Storage(config.storage)
    assert [file.path.rsplit("/", 1)[1] for file in manifest.files] == ["run.json", ".metadata", "__0_0.distcp"]
    assert [file.bytes for file in manifest.files] == [len(storage.read(file.path)) for file in manifest.files]
    metadata = storage.read(manifest.files[1].path)
    assert manifest.metadata_sha256 == hashlib.sha256(metadata).hexdigest()
    pieces = [piece for tensor in json.loads(metadata)["tensors"].values() for piece in tensor["pieces"]]
    part = storage.read(manifest.files[2].path)
    assert sum(bytes for *_, bytes, _, _ in pieces) == len(part)  # no byte without a checksum
    assert any(bytes > 3 * block for *_, bytes, _, block in pieces)
    for *_, start, bytes, xxh3, block in pieces:
        ends = [*range(start + block, start + bytes, block), start + bytes]
        blocks = [part[begin:end] for begin, end in zip([start, *ends], ends)]
        assert xxhash.xxh3_128_hexdigest(b"".join(map(xxhash.xxh3_128_digest, blocks))) == xxh3
    assert manifest.next_sequence == 16
    assert manifest.tokens_seen == watched.progress[-1].tokens < 16 * 16
    assert manifest.mesh == {"replicate": 1, "shard": 1, "ep": 1}
    run = Run(config, tiny_dataset(storage), storage)
    assert dataclasses.asdict(run.at) == {"step": 2, "next_sequence": 16}
    assert run.tokens_seen == manifest.tokens_seen


@pytest.mark.parametrize(
    ("place", "count"),
    [("folder", 20), *(pytest.param(place, 200, marks=pytest.mark.long) for place in ("folder", "s3"))],
)
def test_many_saves_leak_nothing(tmp_path, request, place, count):
    """No thread, file descriptor, folder, temporary or staged copy more after many saves than after some, and no memory."""
    config = tiny(str(tmp_path), steps=2, checkpoint__async_save=True, checkpoint__keep=2)
    if place == "s3":
        config = config.model_copy(update={"storage": request.getfixturevalue("s3_root")})
    storage = Storage(config.storage)
    run = Run(config, tiny_dataset(storage), storage)
    state = {**run.state(), "ballast": torch.zeros(1000, 1000)}  # 4 MB: a copy that stays would be seen
    seen, memory = [], []
    for step in range(1, count + 1):
        run.checkpoints.save(state, step=step, next_sequence=step, tokens_seen=step, loss=1.0)
        run.checkpoints.wait_staged()
        manifest = run.checkpoints.settle()
        assert manifest.step == step
        if step % (count // 20):
            continue
        gc.collect()
        tensors = sum(isinstance(each, torch.Tensor) for each in gc.get_objects())
        files = len(storage.list("runs")) + len(list(tmp_path.rglob("*.tmp-*")))
        held = len(os.listdir("/proc/self/fd")) if place == "folder" else len(psutil.Process().open_files())
        seen.append((held, files, tensors, threading.active_count() if place == "folder" else 0))
        memory.append(psutil.Process().memory_info().rss)
    run.close()
    assert [manifest.step for manifest in committed(storage, "tiny")] == [count - 1, count]
    held, *others = zip(*seen[3:])
    assert [len(set(each)) for each in others] == [1, 1, 1]
    assert (
        max(held) - min(held) <= 2 < len(held)
    )  # other tests' servers live in this process, and take a connection now and then
    assert memory[-1] - memory[10] < count // 2 * 1_000_000
