"""Weight files from a checkpoint's pieces: the safetensors package reads them, whoever wrote the checkpoint, whatever is cut where."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from pipeline.checked_stream import NotAsWritten
from pipeline.config.load import validate
from pipeline.config.schema import CheckpointConfig, RunConfig
from pipeline.evaluation.weights import load_model
from pipeline.manifest import CheckpointManifest
from pipeline.model.hf import hf_tensors
from pipeline.parallel.mesh import build_meshes
from pipeline.publishing import check
from pipeline.publishing.check import NotTheModel, check_first_layers, check_texts, open_published
from pipeline.publishing.export import publish, write_here
from pipeline.publishing.layout import index_of, plan_files, published_dtype
from pipeline.publishing.weights import checkpoint_bytes, write_file
from pipeline.storage import Storage
from pipeline.training.checkpoint import Checkpointer
from pipeline.training.commits import DamagedCheckpoint, RunFacts
from pipeline.training.files import CheckpointReader
from pipeline.training.trainer import build
from tests.distributed import run_distributed
from tests.evaluation.make import folder_digests, run_config
from tests.publishing.conftest import PublishedRun


def with_publishing(config: RunConfig, **changes: object) -> RunConfig:
    return config.model_copy(update={"publishing": config.publishing.model_copy(update=changes)})


@given(st.integers(1, 200_000), st.sampled_from(["fp32", "bf16"]))
@settings(max_examples=15, derandomize=True, deadline=None)
def test_wherever_files_are_cut_the_tensors_are_the_checkpoints(run: PublishedRun, limit: int, dtype: str):
    config = with_publishing(run.made.config, shard_bytes=limit, dtype=dtype)
    files = plan_files(config)
    reader = CheckpointReader(run.made.storage, run.made.checkpoint)
    expected = dict(hf_tensors(run.made.model))
    found = {}
    for file in files:
        starts = [0]
        dtypes = {tensor.name: tensor.dtype for tensor in file.tensors}
        for name, parts in groupby(checkpoint_bytes(file, reader), key=itemgetter(0)):
            data = b"".join(bytes(part) for _, part in parts)
            found[name] = torch.frombuffer(bytearray(data), dtype=dtypes[name]).view(expected[name].shape)
            assert starts[-1] % dtypes[name].itemsize == 0, "a reader that maps the file could not view it"
            starts.append(starts[-1] + len(data))
        assert len(file.header) % 8 == 0
        header = json.loads(file.header[8:])
        ends = [header[tensor.name]["data_offsets"][1] for tensor in file.tensors]
        assert starts[1:] == ends
        assert starts[-1] <= limit or len(file.tensors) == 1
    assert found.keys() == expected.keys() == index_of(files)["weight_map"].keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(published_dtype(name, dtype))), name


def test_the_safetensors_package_reads_what_was_planned(run: PublishedRun, tmp_path: Path):
    config = with_publishing(run.made.config, dtype="bf16", shard_bytes=10**9)
    (file,) = plan_files(config)
    storage = Storage(config.storage.model_copy(update={"root": str(tmp_path)}))
    written = write_file(file, CheckpointReader(run.made.storage, run.made.checkpoint), storage, "out")
    assert folder_digests(tmp_path / "out") == {file.name: written.entry.sha256}
    assert written.entry.bytes == (tmp_path / "out" / file.name).stat().st_size
    with safe_open(tmp_path / "out" / file.name, "pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}
        for name, tensor in hf_tensors(run.made.model):
            assert torch.equal(tensors.get_tensor(name), tensor.to(published_dtype(name, "bf16"))), name


# -- from a checkpoint of several ranks ------------------------------------------------------------------------------


def save_on_ranks(values: dict) -> CheckpointManifest:
    config = validate(values)
    device = torch.device("cpu")
    model, _ = build(config, build_meshes(config.parallelism, "cpu"), device)
    facts = RunFacts(config.run_id, {"model": "made"}, "d" * 64, "0" * 64)
    checkpoints = Checkpointer(Storage(config.storage), CheckpointConfig(async_save=False), facts, device)
    checkpoints.save(dict(model.state_dict()), step=1, next_sequence=1, tokens_seen=1, loss=1.0)
    manifest = checkpoints.settle()
    checkpoints.close()
    assert manifest is not None
    return manifest


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.long)])
def test_pieces_of_several_ranks_make_the_files_of_one(tmp_path: Path, world: int):
    """Experts cut by expert and, of 4 shards, by row; everything else by rows: the same bytes as from the whole network."""
    values = run_config(str(tmp_path)).model_dump(mode="json")
    values["parallelism"] = {"replicate": 1, "shard": world, "ep": 2}
    checkpoint, *others = run_distributed(save_on_ranks, world, values)
    assert others == [checkpoint] * (world - 1)
    config = validate(values)
    storage = Storage(config.storage)
    reader = CheckpointReader(storage, checkpoint)
    pieces = reader.read_metadata().state_dict_metadata["layers.1.mlp.experts.gate_proj"].chunks
    assert len({tuple(piece.offsets) for piece in pieces}) == world

    for written in write_here(storage, config, checkpoint, "out"):
        assert folder_digests(tmp_path / "out")[written.entry.path] == written.entry.sha256
    found = {}
    for file in plan_files(config):
        with safe_open(tmp_path / "out" / file.name, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    expected = dict(hf_tensors(load_model(config, checkpoint, storage)))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_box_that_is_not_there_is_named(run: PublishedRun):
    reader = CheckpointReader(run.made.storage, run.made.checkpoint)
    with pytest.raises(ValueError, match=r"norm.weight has shape \[32\], expected shape \[40\] or more"):
        reader.read_box("norm.weight", torch.empty(40), [0])
    with pytest.raises(ValueError, match=r"layers\.9\.norm is missing"):
        reader.read_box("layers.9.norm", torch.empty(1), [0])


def test_a_checksum_that_is_wrong_at_the_end_of_a_piece_leaves_no_file(run: PublishedRun, tmp_path: Path):
    """Its first blocks are written by then."""
    file = plan_files(run.made.config)[0]
    storage = Storage(run.made.config.storage.model_copy(update={"root": str(tmp_path)}))
    reader = CheckpointReader(run.made.storage, run.made.checkpoint)
    places = reader.read_metadata().storage_data
    index = next(index for index in places if index.fqn == file.tensors[-1].source)
    places[index] = replace(places[index], xxh3="0" * 32)
    with pytest.raises(DamagedCheckpoint, match=rf"{re.escape(index.fqn)}: bytes .* written as 0000"):
        write_file(file, reader, storage, "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_that_storage_gives_back_otherwise_is_refused(run: PublishedRun, tmp_path: Path):
    """The storage flips the last bit of what was written, behind the writer's back."""
    file = plan_files(run.made.config)[0]

    class Flips(Storage):
        @contextlib.contextmanager
        def stream(self, path: str) -> Iterator[IO[bytes]]:
            with super().stream(path) as out:
                yield FlipsTheLast(out, file.nbytes)

    storage = Flips(run.made.config.storage.model_copy(update={"root": str(tmp_path)}))
    with pytest.raises(NotAsWritten, match=rf"{re.escape(file.name)}: bytes 0 to {file.nbytes} are not in storage"):
        write_file(file, CheckpointReader(run.made.storage, run.made.checkpoint), storage, "out")
    assert list((tmp_path / "out").iterdir()) == []


class FlipsTheLast(io.FileIO):
    """Writes through to the file that it opens by the other's name, the last of so many bytes with a flipped bit."""

    def __init__(self, file: IO[bytes], last: int) -> None:
        super().__init__(file.name, "wb")
        self.left = last

    def write(self, data: Any) -> int:
        data = bytearray(data)
        self.left -= len(data)
        if data and not self.left:
            data[-1] ^= 1
        super().write(data)
        return len(data)


@pytest.mark.parametrize(
    "swap", [("mlp.experts.3.gate_proj", "mlp.experts.3.up_proj"), ("input_layernorm", "post_attention_layernorm")]
)
def test_weights_under_wrong_names_are_no_model(
    run: PublishedRun, monkeypatch: pytest.MonkeyPatch, swap: tuple[str, str]
):
    """As if a name were mapped wrongly on the way out: digests agree, shapes may, the network does not."""
    first, second = (f"model.layers.1.{name}.weight" for name in swap)
    files = plan_files(run.made.config)
    published = open_published(
        run.made.config, files, run.made.storage, str(run.folder.relative_to(run.made.storage.root)), run.manifest.xxh3
    )
    read = published.read
    names = {first: second, second: first}

    def swapped(name: str) -> torch.Tensor:
        return read(names.get(name, name))

    fields = json.loads((run.folder / "config.json").read_text())
    reader = CheckpointReader(run.made.storage, run.made.checkpoint)
    check_first_layers(run.made.config, reader, published, fields, "there")
    monkeypatch.setattr(published, "read", swapped)
    with pytest.raises(NotTheModel, match="there: transformers computes other logits"):
        check_first_layers(run.made.config, reader, published, fields, "there")


def test_a_text_that_transformers_would_not_write_is_refused(run: PublishedRun):
    folder = str(run.folder.relative_to(run.made.storage.root))
    prompt = [run.made.dataset.tokenizer.eos_id, 7, 8]
    with pytest.raises(NotTheModel, match=r"after 3 tokens of a sample transformers finds token \d+ likelier than 11"):
        check_texts(run.made.storage, folder, [(prompt, [11])], 64, torch.device("cpu"))


def test_nothing_is_committed_that_is_not_the_model(run: PublishedRun, monkeypatch: pytest.MonkeyPatch):
    def other(name: str, dtype: str) -> torch.dtype:
        return torch.float16  # of the reference: as if the published numbers were rounded otherwise

    monkeypatch.setattr(check, "published_dtype", other)
    monkeypatch.setattr(check, "TOLERANCE", 1e-6)
    made = run.made
    config = with_publishing(made.config, name="refused")
    with pytest.raises(NotTheModel, match="nothing was committed"):
        publish(config, made.train, run.evaluation, made.dataset, made.storage, report=lambda _: None)
    assert not [info for info in made.storage.list("models/refused") if info.path.endswith("manifest.json")]
