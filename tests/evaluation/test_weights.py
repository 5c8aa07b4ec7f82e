"""Weights out of a real checkpoint: whole, and block by block."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pipeline.config.load import load_config
from pipeline.evaluation.weights import empty_model, load_model, stream_tensors
from pipeline.model.shapes import count_parameters
from tests.evaluation.make import MadeRun


def test_loaded_weights_are_the_saved_ones(made: MadeRun):
    loaded = load_model(made.config, made.checkpoint, made.storage)
    assert not loaded.training
    found, saved = loaded.state_dict(), made.model.state_dict()
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)


def test_the_stream_is_the_state_in_order(made: MadeRun):
    streamed = list(stream_tensors(made.config.model, made.checkpoint, made.storage))
    saved = made.model.state_dict()
    assert [name for name, _ in streamed] == list(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in streamed)


def test_a_checkpoint_of_another_network_is_named(made: MadeRun):
    def load(**changes: int) -> None:
        model = made.config.model.model_copy(update=changes)
        load_model(made.config.model_copy(update={"model": model}), made.checkpoint, made.storage)

    with pytest.raises(ValueError, match=r"embed_tokens.weight has shape \[400, 32\], expected shape \[400, 40\]"):
        load(hidden_size=40)
    with pytest.raises(ValueError, match=r"layers.3.* is missing"):
        load(num_hidden_layers=4)


def test_the_empty_model_takes_no_memory(made: MadeRun):
    assert {parameter.device.type for parameter in empty_model(made.config.model).parameters()} == {"meta"}


def test_the_empty_model_brings_no_compiler():
    """Every worker that writes a file of weights makes one."""
    code = (
        "import sys; from pipeline.config.load import load_config; from pipeline.publishing.layout import plan_files; "
        "plan_files(load_config('debug')); assert not {'torch._dynamo', 'torch._inductor', 'triton'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_moonlight_has_the_published_number_of_parameters():
    found = count_parameters(load_config("moonlight-16b-a3b").model)
    assert (found.total, found.active) == (
        15_960_108_544,
        2_914_774_528,
    )  # config.json and the paper's tables, with both embeddings
