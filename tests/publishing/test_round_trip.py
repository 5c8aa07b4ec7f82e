"""A folder that transformers made, imported as initial weights and published after no step: the same tensors, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from pipeline.config.load import validate
from pipeline.manifest import CheckpointManifest
from pipeline.model.hf import hf_config
from pipeline.publishing.export import write_here
from pipeline.publishing.layout import INDEX, index_of, plan_files
from pipeline.storage import Storage
from pipeline.training.trainer import Run
from tests.distributed import run_distributed
from tests.training.make import tiny, tiny_dataset

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BIAS = "e_score_correction_bias"


def made_by_transformers(folder: Path, dtype: str) -> DeepseekV3ForCausalLM:
    """Random weights of its own drawing, saved in several files."""
    torch.manual_seed(5)
    fields = hf_config(tiny("made").model, bos_token_id=None, eos_token_id=1) | {"pad_token_id": None}
    model = DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(fields)).eval()
    for name, buffer in model.named_buffers():
        if name.endswith(BIAS):
            buffer.uniform_(-0.2, 0.2)
    model.to(DTYPES[dtype]).save_pretrained(folder, max_shard_size="8KB")
    return model


def run_of(root: str, weights: Path, dtype: str, ranks: int) -> dict[str, object]:
    config = tiny(
        root,
        training__initial_weights=str(weights),
        parallelism={"shard": ranks, "ep": 2} if ranks > 1 else {},
        training__micro_batch=1,
        publishing={"name": "m", "dtype": dtype, "shard_bytes": 10_000},
        seed=9,
    )
    return config.model_dump(mode="json")


def begun(values: dict[str, object]) -> CheckpointManifest:
    """The checkpoint of a run as it begins, before its first step."""
    config = validate(values)
    storage = Storage(config.storage)
    run = Run(config, tiny_dataset(storage), storage)
    run.checkpoints.save(run.state(), step=0, next_sequence=0, tokens_seen=0, loss=None)
    manifest = run.checkpoints.settle()
    run.close()
    assert manifest is not None
    return manifest


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long), pytest.param(4, marks=pytest.mark.long)])
def test_what_came_from_transformers_leaves_as_it_came(tmp_path: Path, dtype: str, ranks: int) -> None:
    """By the `safetensors` package: every name, shape and bit; by transformers: the same logits."""
    theirs = made_by_transformers(tmp_path / "theirs", dtype)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    values = run_of(str(tmp_path / "root"), tmp_path / "theirs", dtype, ranks)
    checkpoint = begun(values) if ranks == 1 else run_distributed(begun, ranks, values)[0]
    config = validate(values)
    storage = Storage(config.storage)
    list(write_here(storage, config, checkpoint, "out"))
    out = tmp_path / "root" / "out"

    before, after = tensors_of(tmp_path / "theirs"), tensors_of(out)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor.to(after[name].dtype)), name
        assert after[name].dtype == (torch.float32 if name.endswith(BIAS) else DTYPES[dtype]), name

    (out / INDEX).write_text(json.dumps(index_of(plan_files(config))))
    (out / "config.json").write_text((tmp_path / "theirs" / "config.json").read_text())
    ours = AutoModelForCausalLM.from_pretrained(out, dtype=DTYPES[dtype]).eval()
    ids = torch.randint(0, config.model.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=DTYPES[dtype]).eval()(ids).logits
        assert torch.equal(ours(ids).logits, expected)
        if dtype == "fp32":
            assert torch.equal(expected, theirs(ids).logits)
