"""A run small enough to train in a second: 2 layers, 4 experts, rows of 16 tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.file_index import dataset_path
from pipeline.manifest import CheckpointManifest, DatasetManifest, TrainManifest
from pipeline.storage import Storage
from pipeline.training import trainer
from pipeline.training.metrics import TrainProgress
from pipeline.training.step import Step
from pipeline.training.trainer import train
from tests.dataset.make import documents, manifest, write_packed

VOCABULARY = 64
SEQUENCE = 16
BATCH = 8
EOS = 1


def tiny(root: str, *, steps: int = 4, **overrides: Any) -> RunConfig:
    """`training__micro_batch=2` sets `training.micro_batch`."""
    tokens = steps * BATCH * SEQUENCE
    values: dict[str, Any] = {
        "run_id": "tiny",
        "storage": {"root": root},
        "tokenizer": {"path": "none", "vocab_size": VOCABULARY},
        "corpus": {"sources": [{"name": "s0", "path": "none", "max_epochs": 8}, {"name": "s1", "path": "none", "max_epochs": 8}]},
        "data": {"sequence_length": SEQUENCE, "rows_per_group": 4, "lanes": 4, "mixture_block": 4, "window_blocks": 2, "max_padding": 1.0},
        "model": {
            "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_lora_rank": 8,
            "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "intermediate_size": 24, "moe_intermediate_size": 8,
            "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "max_position_embeddings": SEQUENCE,
        },
        "schedule": {
            "total_tokens": tokens,
            "learning_rate": [{"until_tokens": tokens, "shape": "linear", "start": 0.01, "end": 0.001}],
            "global_batch": [{"until_tokens": tokens, "sequences": BATCH}],
            "bias_rate": [{"until_tokens": tokens, "rate": 0.01}],
        },
        "training": {"sequence_length": SEQUENCE, "micro_batch": 2, "log_every": 1, "step_timeout_s": 100.0},
        "checkpoint": {"every_steps": 2, "keep": 3, "async_save": False},
    }  # fmt: skip
    if "experts" in overrides:
        values["model"] |= {"n_routed_experts": overrides.pop("experts"), "num_experts_per_tok": 1}
    for name, value in overrides.items():
        section, _, key = name.partition("__")
        if key:
            values.setdefault(section, {})[key] = value
        else:
            values[section] = value
    return validate(values)


def tiny_dataset(storage: Storage, rows: int = 64, *, padding: bool = True) -> DatasetManifest:
    """Two sources of packed documents with a pattern to learn: each token is the one before plus the document's stride.
    Without `padding` the last document of a row fills it."""
    sources = []
    for s in range(2):
        rng = np.random.default_rng(s)
        doc_lens = [documents(rng, SEQUENCE) for _ in range(rows)]
        if not padding:
            doc_lens = [[*lengths[:-1], SEQUENCE - sum(lengths[:-1])] for lengths in doc_lens]
        tokens = np.full((rows, SEQUENCE), EOS, dtype=np.uint16)
        for row, lengths in enumerate(doc_lens):
            at = 0
            for length in lengths:
                tokens[row, at : at + length - 1] = 2 + (rng.integers(62) + (1 + s) * np.arange(length - 1)) % 62
                at += length
        sources.append([write_packed(storage, f"datasets/tiny/packed/s{s}.parquet", tokens, doc_lens, 4)])
    found = manifest(sources, SEQUENCE, 4, "uint16", storage)
    tokenizer = found.tokenizer.model_copy(update={"vocab_size": VOCABULARY, "eos_id": EOS})
    found = found.model_copy(update={"tokenizer": tokenizer})
    storage.write(dataset_path(found.identity), found.to_json())  # where workers on Ray read it
    return found


def spiking_data(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`spiking_data(monkeypatch)(position, ...)`: a step that begins at one of these positions of the data spikes, whoever trains it and
    whenever."""
    positions: set[int] = set()
    reading, backward, at = trainer.read_step, Step.forward_backward, list[int]()

    def read(loader: Any, first: int, *arguments: Any) -> Any:
        at.append(int(loader.order.positions(first)))
        return reading(loader, first, *arguments)

    def spiking(self: Step, *arguments: Any) -> Any:
        loss, aux_loss = backward(self, *arguments)
        return loss + (50.0 if at[-1] in positions else 0.0), aux_loss

    monkeypatch.setattr(trainer, "read_step", read)
    monkeypatch.setattr(Step, "forward_backward", spiking)
    return lambda *more: positions.update(more)


class Watched:
    """What a run reported."""

    def __init__(self) -> None:
        self.progress: list[TrainProgress] = []
        self.checkpoints: list[CheckpointManifest] = []

    @property
    def losses(self) -> list[float]:
        return [progress.loss for progress in self.progress]

    def train(self, config: RunConfig, **options: Any) -> TrainManifest:
        storage = Storage(config.storage)
        return train(
            config, tiny_dataset(storage), storage,
            report=self.progress.append, on_checkpoint=self.checkpoints.append, **options,
        )  # fmt: skip
