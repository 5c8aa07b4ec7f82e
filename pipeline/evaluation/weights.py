"""A checkpoint's weights in one process, without the optimizer's state.

A checkpoint is a torch DCP folder, written by any number of ranks, of parameters, router biases, optimizer moments and
counters. DCP reads the tensors that are asked for and nothing else: about a third of the bytes. Memory: one copy of the
weights in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_loader import load

from pipeline.config.schema import ModelConfig
from pipeline.manifest import CheckpointManifest
from pipeline.model.moonlight import Moonlight
from pipeline.storage import Storage
from pipeline.training.checkpoint import step_folder
from pipeline.training.files import CheckpointReader


def load_model(
    config: ModelConfig, checkpoint: CheckpointManifest, storage: Storage, *, device: torch.device | None = None
) -> Moonlight:
    """The network in fp32 and eval mode, on the CPU by default, with the checkpoint's weights and router biases."""
    with torch.device("meta"):
        model = Moonlight(config)
    model.to_empty(device=device or torch.device("cpu"))
    model.eval().requires_grad_(False)
    read_tensors(dict(model.state_dict()), checkpoint, storage)
    return model


def read_tensors(tensors: dict[str, Any], checkpoint: CheckpointManifest, storage: Storage) -> None:
    """Fill the named tensors from the checkpoint. Raises ValueError that names one it lacks or holds in another shape."""
    folder = step_folder(checkpoint.run_id, checkpoint.step)
    reader = CheckpointReader(storage, folder)
    stored: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    for name, tensor in tensors.items():
        if name not in stored or stored[name].size != tensor.shape:
            found = f"has shape {list(stored[name].size)}" if name in stored else "is missing"
            raise ValueError(
                f"checkpoint {storage.uri(folder)}: {name} {found}, expected shape {list(tensor.shape)}; "
                "use the model section that the run was trained with"
            )
    load(tensors, storage_reader=reader, no_dist=True)
