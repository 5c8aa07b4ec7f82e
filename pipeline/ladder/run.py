"""One rung, in this process: trained to its end, and its last checkpoint scored on the held-out documents."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from pipeline.config.load import validate
from pipeline.evaluation.heldout import evaluate
from pipeline.file_index import read_dataset
from pipeline.ladder.rungs import flops
from pipeline.storage import open_storage
from pipeline.training.trainer import train


def execute(values: dict[str, Any], dataset_identity: str) -> tuple[float, float]:
    """(training FLOPs, held-out loss in nats per token). What is done already is not done again."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # a rung is one process
    config = validate(values)
    storage = open_storage(config.storage)
    dataset = read_dataset(storage, dataset_identity)
    manifest = train(config, dataset, storage, report=lambda _: None)
    score = evaluate(config, dataset, manifest.checkpoint, storage, report=lambda _: None)
    return flops(config), score.overall.loss
