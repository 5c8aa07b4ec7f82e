"""A finished run in miniature: real text, a real tokenizer, held-out documents and a committed checkpoint.

The network has random weights: what is tested is the arithmetic behind its score, not the score.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.config.load import validate
from pipeline.config.schema import CheckpointConfig, RunConfig
from pipeline.manifest import (
    CheckpointManifest,
    DatasetManifest,
    DocumentCounts,
    FileEntry,
    HeldoutFile,
    SourceManifest,
    TokenizerManifest,
    TrainManifest,
)
from pipeline.model.moonlight import Moonlight
from pipeline.storage import Storage
from pipeline.tokenizer import Encoder, train_tokenizer
from pipeline.training.checkpoint import Checkpointer
from pipeline.training.commits import RunFacts
from tests.model.oracle import random_model

VOCABULARY = 400
SEQUENCE = 64
TEXTS = {
    "code": [
        "def area(width, height):\n    return width * height\n\n\nclass Circle:\n    def __init__(self, r):\n        self.r = r\n",
        "for i in range(10):\n    print(i, i ** 2)\n" * 25,
        "x = 1\n",
    ],
    "prose": [
        "The moon rose late. 月亮升起来了。 It lit the road, the field and the 17 houses behind it. [EOS] is only text here.\n"
        * 40,
        "Ein kurzer Satz mit Umlauten: äöüß – and an emoji 🌙.",
    ],
}


@dataclass(frozen=True)
class MadeRun:
    """Everything that evaluate and publish take."""

    config: RunConfig
    storage: Storage
    dataset: DatasetManifest
    checkpoint: CheckpointManifest
    train: TrainManifest
    model: Moonlight  # what the checkpoint holds


def run_config(root: str, **publishing: object) -> RunConfig:
    return validate(
        {
            "run_id": "made",
            "storage": {"root": root},
            "tokenizer": {"vocab_size": VOCABULARY},
            "corpus": {"sources": [{"name": "code", "path": "c", "weight": 3.0}, {"name": "prose", "path": "p"}]},
            "data": {"sequence_length": SEQUENCE, "rows_per_group": 1, "lanes": 2, "mixture_block": 4, "window_blocks": 1, "max_padding": 0.1},
            "model": {
                "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
                "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 20,
                "intermediate_size": 80, "moe_intermediate_size": 24, "n_routed_experts": 8, "n_shared_experts": 2,
                "num_experts_per_tok": 3, "max_position_embeddings": SEQUENCE, "rms_norm_eps": 1e-5,
            },
            "schedule": {
                "total_tokens": 12800,
                "learning_rate": [{"until_tokens": 12800, "shape": "cosine", "start": 1e-3, "end": 1e-4}],
                "global_batch": [{"until_tokens": 12800, "sequences": 4}],
                "bias_rate": [{"until_tokens": 12800, "rate": 1e-3}],
            },
            "training": {"sequence_length": SEQUENCE},
            "evaluation": {"batch": 3},
            "publishing": {"name": "tiny", "dtype": "fp32", "shard_bytes": 60_000, "sample_tokens": 5, "beats_frequencies": False, **publishing},
        }
    )  # fmt: skip


def make_run(config: RunConfig) -> MadeRun:
    """Write the run's tokenizer, dataset, checkpoint and metrics below the storage root."""
    storage = Storage(config.storage)
    dataset = _dataset(storage, config)
    model = random_model(config.model)
    facts = RunFacts(config.run_id, {"model": "made"}, dataset.digest, "0" * 64)
    checkpoints = Checkpointer(storage, CheckpointConfig(async_save=False), facts, torch.device("cpu"))
    optimizer_state = {"norm.weight.exp_avg": torch.zeros(config.model.hidden_size)}  # present in every checkpoint
    checkpoints.save(
        model.state_dict() | optimizer_state,
        step=50,
        next_sequence=200,
        tokens_seen=12500,
        loss=5.5,
        skipped_steps=1,
        mesh={"replicate": 1, "shard": 2, "ep": 2},
    )
    checkpoint = checkpoints.settle()
    checkpoints.close()
    assert checkpoint is not None
    lines = [{"step": step, "tokens": 256 * step, "loss": 6.0 - step / 100} for step in range(5, 51, 5)]
    lines[3]["loss"] = None  # a skipped step
    metrics = _put(storage, "runs/made/train/metrics/00000050.jsonl", b"\n".join(json.dumps(x).encode() for x in lines))
    train = TrainManifest(identity="1" * 64, checkpoint=checkpoint, steps=50, metrics=(metrics,), skipped_steps=1)
    return MadeRun(config, storage, dataset, checkpoint, train, model.eval())


def _dataset(storage: Storage, config: RunConfig) -> DatasetManifest:
    files = train_tokenizer((text for texts in TEXTS.values() for text in texts), config.tokenizer)
    for name, data in files.items():
        storage.write(f"tokenizers/t/{name}", data)
    encoder = Encoder.load("tokenizers/t", storage)
    tokenizer = TokenizerManifest(
        folder="tokenizers/t",
        files=tuple(
            FileEntry(path=f"tokenizers/t/{name}", bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            for name, data in files.items()
        ),
        vocab_size=encoder.vocab_size,
        eos_id=encoder.eos_id,
        special_tokens=encoder.special_tokens,
        sha256=hashlib.sha256(files["tokenizer.json"]).hexdigest(),
    )
    return DatasetManifest(
        identity="d" * 64,
        tokenizer=tokenizer,
        token_dtype="uint16",
        sequence_length=SEQUENCE,
        rows_per_group=1,
        sources=tuple(_source(storage, name, texts, encoder) for name, texts in TEXTS.items()),
        files=FileEntry(path="datasets/d/files.arrow", bytes=0, sha256=""),  # nobody looks at it
        versions={},
    )


def _source(storage: Storage, name: str, texts: list[str], encoder: Encoder) -> SourceManifest:
    tokens = [encoder.encode([text.encode()])[0] for text in texts]
    sizes = [len(text.encode()) for text in texts]
    table = pa.table(
        {
            "tokens": pa.array([ids.astype("<u2").tobytes() for ids in tokens], pa.binary()),
            "n_bytes": pa.array(sizes, pa.int64()),
            "doc_id": pa.array([f"{name}/{index}" for index in range(len(texts))]),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    entry = _put(storage, f"datasets/d/heldout/{name}.parquet", buffer.getvalue())
    heldout = HeldoutFile(
        **entry.model_dump(), documents=len(texts), tokens=sum(map(len, tokens)), text_bytes=sum(sizes)
    )
    counts = DocumentCounts(docs_in=9 + len(texts), docs_out=9, heldout=len(texts), filtered={}, quarantined={})
    return SourceManifest(
        name=name, heldout=(heldout,), counts=counts,
        rows=10, tokens=600, text_bytes=2000, dropped_rows=0,
    )  # fmt: skip


def _put(storage: Storage, path: str, data: bytes) -> FileEntry:
    storage.write(path, data)
    return FileEntry(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def folder_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and ".tmp-" not in path.name)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def documents_of(run: MadeRun, source: str) -> list[np.ndarray]:
    """The token ids of a source's held-out documents, encoded afresh."""
    encoder = Encoder.load("tokenizers/t", run.storage)
    return [encoder.encode([text.encode()])[0].astype(np.int64) for text in TEXTS[source]]
