"""Damaged checkpoints: every flip is named, the newest sound checkpoint is used, and what is not used harms nobody."""

import hashlib
import json
import random
from pathlib import Path

import pytest
import xxhash

from pipeline.evaluation.weights import load_model, stream_tensors
from pipeline.integrity import read_record
from pipeline.lease import living
from pipeline.manifest import DamagedRecord, TrainManifest
from pipeline.storage import Storage
from pipeline.training import content, initial, pieces
from pipeline.training.checkpoint import load_state
from pipeline.training.commits import (
    WITHDRAWN,
    DamagedCheckpoint,
    NoSoundCheckpoint,
    committed,
    lease_path,
    manifest_path,
    read_manifest,
    step_folder,
    train_folder,
)
from pipeline.training.left_out import Detour, LeftOut, left_out_path, read_left_out
from pipeline.training.metrics import sound_files
from pipeline.training.proof import CheckpointReport, check_checkpoint
from pipeline.training.trainer import Run
from tests.distributed import run_distributed
from tests.flips import check_flips, is_blank
from tests.training.make import Watched, tiny, tiny_dataset


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


def file(root: Path, step: int, name: str) -> Path:
    [found] = (root / step_folder("tiny", step)).rglob(name)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of 6 steps with checkpoints at 2, 4 and 6; read only."""
    root = tmp_path_factory.mktemp("trained")
    return root, Watched().train(tiny(str(root), steps=6))


def again(root: Path, **overrides) -> tuple[Watched, object]:
    watched = Watched()
    return watched, watched.train(tiny(str(root), steps=6, **overrides))


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
@pytest.mark.parametrize("count", [20, pytest.param(300, marks=pytest.mark.long)])
def test_every_flip_is_named_and_nothing_is_loaded(tmp_path, name, count):
    config = tiny(str(tmp_path), steps=2)
    manifest = Watched().train(config).checkpoint
    storage = Storage(config.storage)
    run = Run(config, tiny_dataset(storage), storage)
    state = run.state()
    run.close()
    path, rng = file(tmp_path, 2, name), random.Random(count)
    tensors = set(state)
    for bit in rng.sample(range(8 * path.stat().st_size), count):
        flip(path, bit)
        with pytest.raises(DamagedCheckpoint) as refusal:
            load_state(state, storage, manifest, None)
        assert str(refusal.value).startswith(f"{path}: ")
        if name != ".metadata":
            assert str(refusal.value).split(": ")[1] in tensors
        flip(path, bit)
    load_state(state, storage, manifest, None)


def stored(root: Path, kind: str):
    """A record of a run, and how it is read."""
    storage = Storage(tiny(str(root)).storage)
    records = {
        "checkpoint": (manifest_path("tiny", 2), lambda: read_manifest(storage, "tiny", 2)),
        "run": (f"{train_folder('tiny')}/manifest.json", lambda: read_record(storage, path, TrainManifest)),
        "writer": (lease_path("tiny"), lambda: living(storage, path)),
        "left out": (left_out_path("tiny"), lambda: read_left_out(storage, "tiny")),
        "initial weights": (initial.answer_path("tiny"), lambda: initial.answer_of("tiny", storage)),
    }
    path, read = records[kind]
    if kind == "left out":
        detour = Detour(spike=7, back_to=4, left_out=(32, 56), loss=9.5, gradient_norm=3.25)
        storage.write(path, LeftOut(detours=(detour,)).to_json())
    if kind == "initial weights":
        storage.write(path, initial.Answer(initial_weights="models/x/1@sha256:" + "0" * 64).to_json())
    return root / path, read


@pytest.mark.parametrize("count", [6, pytest.param(300, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["checkpoint", "run", "writer", "left out", "initial weights"])
def test_every_flip_in_a_record_is_named(tmp_path, kind, count):
    Watched().train(tiny(str(tmp_path), steps=2))
    path, read = stored(tmp_path, kind)
    check_flips(path, read, count, is_blank)


@pytest.mark.parametrize("count", [6, pytest.param(300, marks=pytest.mark.long)])
def test_flipped_metrics_are_named_and_left_out(tmp_path, capsys, count):
    config = tiny(str(tmp_path), steps=2)
    manifest, storage = Watched().train(config), Storage(config.storage)
    (entry,) = manifest.metrics
    path, rng = tmp_path / entry.path, random.Random(count)
    for bit in rng.sample(range(8 * path.stat().st_size), count):
        flip(path, bit)
        assert sound_files(storage, manifest.metrics) == ()
        assert f"metrics are left out: {path}: sha256 is" in capsys.readouterr().err
        flip(path, bit)
    assert sound_files(storage, manifest.metrics) == manifest.metrics


def test_evaluation_and_export_refuse_it_by_name(tmp_path):
    config = tiny(str(tmp_path), steps=2)
    manifest = Watched().train(config).checkpoint
    storage = Storage(config.storage)
    metadata = json.loads(file(tmp_path, 2, ".metadata").read_bytes())
    start = metadata["tensors"]["lm_head.weight"]["pieces"][0][3]
    flip(file(tmp_path, 2, "__0_0.distcp"), 8 * start + 6)
    for load in (
        lambda: load_model(config, manifest, storage),
        lambda: list(stream_tensors(config.model, manifest, storage)),
    ):
        with pytest.raises(
            DamagedCheckpoint, match=r"step-00000002/writer-1/__0_0.distcp: lm_head.weight: bytes \d+ to \d+ have"
        ):
            load()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("name", "harm", "why"),
    [
        ("__0_0.distcp", lambda path: flip(path, 12345), "have xxh3"),
        ("__0_0.distcp", truncate, "were written"),
        ("__0_0.distcp", Path.unlink, "the file is missing"),
        (".metadata", lambda path: flip(path, 99), "sha256 is"),
        ("manifest.json", truncate, None),
        ("manifest.json", lambda path: flip(path, 4000), "not a sound CheckpointManifest"),
    ],
)
def test_the_newest_sound_checkpoint_is_used(tmp_path, trained, capsys, name, harm, why):
    """The same weights at the end as without the damage, by the same command."""
    reference = trained[1]
    again(tmp_path)
    (tmp_path / train_folder("tiny") / "manifest.json").unlink()
    harmed = file(tmp_path, 6, name)
    harm(harmed)
    watched, manifest = again(tmp_path)
    said = capsys.readouterr().err
    if why is None:  # the last byte of a manifest is a line feed: nothing is lost
        assert (watched.progress, said) == ([], "")
    else:
        assert [progress.step for progress in watched.progress] == [5, 6]
        assert f"checkpoint of step 6 passed over: {harmed}: " in said
        assert why in said
    assert manifest.digest == reference.digest


def test_an_old_one_harms_nobody(tmp_path, trained):
    again(tmp_path)
    file(tmp_path, 2, "manifest.json").write_bytes(b"{")
    flip(file(tmp_path, 4, "__0_0.distcp"), 5)
    (tmp_path / train_folder("tiny") / "manifest.json").unlink()
    watched, manifest = again(tmp_path)
    assert watched.progress == []
    assert manifest.digest == trained[1].digest
    with pytest.raises(DamagedRecord, match=f"{file(tmp_path, 2, 'manifest.json')}: not a sound CheckpointManifest"):
        list(committed(Storage(tiny(str(tmp_path)).storage), "tiny"))


def test_without_a_sound_one_the_run_is_refused(tmp_path):
    again(tmp_path)
    for step in (2, 4, 6):
        truncate(file(tmp_path, step, "__0_0.distcp"))
    with pytest.raises(
        NoSoundCheckpoint, match=r"no sound checkpoint: .*step-00000006/.*step-00000004/.*step-00000002/"
    ):
        again(tmp_path)
    assert file(tmp_path, 2, "manifest.json").exists()


def test_a_withdrawn_checkpoint_does_not_count(tmp_path, trained):
    """Its bytes stay until the run has come that far; with another interval nothing of it is left at the end."""
    again(tmp_path)
    flip(file(tmp_path, 6, "__0_0.distcp"), 5)
    (tmp_path / train_folder("tiny") / "manifest.json").unlink()

    class Stopped(Exception):
        pass

    def stop(progress):
        raise Stopped

    storage = Storage(tiny(str(tmp_path)).storage)
    watched = Watched()
    watched.progress = type("Stop", (list,), {"append": lambda self, progress: stop(progress)})()
    with pytest.raises(Stopped):
        watched.train(tiny(str(tmp_path), steps=6))
    assert [manifest.step for manifest in committed(storage, "tiny")] == [2, 4]
    assert file(tmp_path, 6, WITHDRAWN).exists()
    _, manifest = again(tmp_path, checkpoint__every_steps=5)
    assert manifest.checkpoint.content_sha256 == trained[1].checkpoint.content_sha256
    assert not list(tmp_path.rglob(WITHDRAWN))


def test_a_checkpoint_is_proven_without_a_network(tmp_path):
    again(tmp_path)
    storage = Storage(tiny(str(tmp_path)).storage)
    part, manifest = file(tmp_path, 6, "__0_0.distcp"), file(tmp_path, 2, "manifest.json")
    sound = check_checkpoint(storage, "tiny", 6)
    assert sound == CheckpointReport(6, part.stat().st_size, ())
    flip(part, 3)
    (damage,) = check_checkpoint(storage, "tiny", 6).damage
    assert damage.startswith(f"{part}: embed_tokens.weight: bytes 0 to ")
    truncate(part)
    assert any("were written" in what for what in check_checkpoint(storage, "tiny", 6).damage)
    part.unlink()
    assert check_checkpoint(storage, "tiny", 6).damage == (f"{part}: the file is missing",)
    flip(manifest, 300)
    (damage,) = check_checkpoint(storage, "tiny", 2).damage
    assert damage.startswith(f"{manifest}: not a sound CheckpointManifest")
    assert "no checkpoint is committed" in check_checkpoint(storage, "tiny", 5).damage[0]


def rewrite(root: Path, step: int, change) -> None:
    """Another `.metadata`, and a manifest that vouches for it."""
    path = file(root, step, ".metadata")
    metadata = json.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(json.dumps(metadata).encode())
    manifest = read_manifest(Storage(tiny(str(root)).storage), "tiny", step)
    size, sha256 = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    entries = tuple(
        each.model_copy(update={"bytes": size}) if each.path.endswith(".metadata") else each for each in manifest.files
    )
    changed = manifest.model_copy(update={"files": entries, "metadata_sha256": sha256})
    file(root, step, "manifest.json").write_bytes(changed.to_json())


def as_format_2(metadata, parts: bytes) -> None:
    """One checksum over the whole of a piece, and no size of blocks."""
    metadata["format"] = 2
    for tensor in metadata["tensors"].values():
        for piece in tensor["pieces"]:
            start, count = piece[3], piece[4]
            piece[5:] = [xxhash.xxh3_128_hexdigest(parts[start : start + count])]


def test_checkpoints_of_before_blocks_had_their_own_checksums_are_read_and_checked(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(content, "BLOCK", 256)  # more than one a piece
    monkeypatch.setattr(pieces, "BLOCK", 256)
    reference = trained[1]
    again(tmp_path)
    part = file(tmp_path, 6, "__0_0.distcp")
    rewrite(tmp_path, 6, lambda metadata: as_format_2(metadata, part.read_bytes()))
    assert check_checkpoint(Storage(tiny(str(tmp_path)).storage), "tiny", 6).damage == ()
    (tmp_path / train_folder("tiny") / "manifest.json").unlink()
    watched, manifest = again(tmp_path)
    assert watched.progress == []
    assert manifest.checkpoint.content_sha256 == reference.checkpoint.content_sha256
    flip(part, 8 * 300)
    (damage,) = check_checkpoint(Storage(tiny(str(tmp_path)).storage), "tiny", 6).damage
    assert damage.startswith(f"{part}: embed_tokens.weight: bytes 0 to ")


def test_a_format_that_is_not_known_is_no_damage(tmp_path, trained):
    """A newer version's checkpoint is refused; taken for damaged it would be withdrawn."""
    again(tmp_path)
    rewrite(tmp_path, 6, lambda metadata: metadata.update(format=99))
    (tmp_path / train_folder("tiny") / "manifest.json").unlink()
    with pytest.raises(
        ValueError, match=r"step-00000006/writer-1/\.metadata: format 99 .* load it with the version"
    ) as refused:
        again(tmp_path)
    assert not isinstance(refused.value, DamagedCheckpoint)
    assert file(tmp_path, 6, "manifest.json").exists()
    assert check_checkpoint(Storage(tiny(str(tmp_path)).storage), "tiny", 6).damage == (str(refused.value),)


def resume_on_two(root: str) -> tuple[int, list[int]]:
    watched = Watched()
    config = tiny(root, steps=6, parallelism={"shard": 2, "ep": 2}, training__micro_batch=1)
    manifest = watched.train(config)
    return manifest.steps, [progress.step for progress in watched.progress]


def test_damage_that_one_rank_sees_is_passed_over_by_all(tmp_path):
    run_distributed(resume_on_two, 2, str(tmp_path))
    flip(file(tmp_path, 6, "__1_0.distcp"), 77)
    assert run_distributed(resume_on_two, 2, str(tmp_path)) == [(6, [5, 6]), (6, [])]
