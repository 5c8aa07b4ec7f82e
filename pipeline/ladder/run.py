"""One rung, in this process: trained to its end, and its last checkpoint scored on the held-out documents."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import torch

from pipeline.config.load import validate
from pipeline.evaluation.heldout import evaluate
from pipeline.file_index import read_dataset
from pipeline.integrity import read_record
from pipeline.ladder.rungs import Beginning, Measured, flops
from pipeline.manifest import TrainManifest
from pipeline.storage import open_storage
from pipeline.training.commits import train_folder
from pipeline.training.guard import RunDiverged
from pipeline.training.trainer import train


def execute(values: dict[str, Any], dataset_identity: str, owner: str) -> Measured:
    """What is done already is not done again: a run's name holds all that decides its loss. `owner`: as of `trainer.train`."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # a rung is one process
    config = validate(values)
    storage = open_storage(config.storage)
    dataset = read_dataset(storage, dataset_identity)
    manifest = read_record(storage, f"{train_folder(config.run_id)}/manifest.json", TrainManifest)
    if manifest is None:
        try:
            manifest = train(config, dataset, storage, report=lambda _: None, owner=owner)
        except RunDiverged:
            return Measured(flops(config), math.inf, None)
    score = evaluate(config, dataset, manifest.checkpoint, storage, report=lambda _: None)
    first = json.loads(storage.read(manifest.metrics[0].path).splitlines()[0])
    assert first["step"] == 1, first
    return Measured(flops(config), score.overall.loss, Beginning(first["loss"], manifest.checkpoint.order_digest))
