"""Which tensor lies where in a published folder: arithmetic on the network's shapes, before anything is written.

Tensors come in the order of the network's state and are cut into files of at most `publishing.shard_bytes` (a larger one is
alone in its file). Inside a file those of larger numbers come first, so that each lies at a multiple of its number's size:
readers map a file and view it. So every file is known to its last header byte to whoever has the configuration, and any
number of writers write the same bytes, each its own files from front to back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch

from pipeline.config.schema import RunConfig
from pipeline.evaluation.weights import empty_model
from pipeline.model.hf import hf_name
from pipeline.model.safetensors import DTYPES as SAFETENSORS_DTYPES

INDEX = "model.safetensors.index.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUTER_BIAS = "e_score_correction_bias"  # stays fp32: it decides near-ties between experts
ALIGNMENT = 8  # bytes, of a file's data
NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class Placed:
    """A published tensor."""

    name: str  # under Hugging Face's names
    source: str  # of the checkpoint's tensor that it is, or is one matrix of
    expert: int | None  # which matrix
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file: its name, and its tensors in the order in which they lie there."""

    name: str
    tensors: tuple[Placed, ...]

    @cached_property
    def header(self) -> bytes:
        """All but the data: length, JSON, and spaces up to the alignment of the data."""
        fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for tensor in self.tensors:
            offsets = [at, at := at + tensor.nbytes]
            fields[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
        data += b" " * (-len(data) % ALIGNMENT)
        return len(data).to_bytes(8, "little") + data

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


def published_dtype(name: str, dtype: str) -> torch.dtype:
    return torch.float32 if name.endswith(ROUTER_BIAS) else DTYPES[dtype]


def published_tensors(config: RunConfig) -> list[Placed]:
    """In the order of the network's state."""
    found = []
    for source, tensor in empty_model(config.model).state_dict().items():
        dtype, shape = published_dtype(source, config.publishing.dtype), tuple(tensor.shape)
        if len(shape) == 3:
            pattern = hf_name(source)
            found += [Placed(pattern.format(expert=e), source, e, dtype, shape[1:]) for e in range(shape[0])]
        else:
            found.append(Placed(hf_name(source), source, None, dtype, shape))
    return found


def plan_files(config: RunConfig) -> list[WeightFile]:
    """The files of a published model."""
    tensors = {tensor.name: tensor for tensor in published_tensors(config)}
    sizes = ((name, tensor.nbytes) for name, tensor in tensors.items())
    groups = plan_shards(sizes, config.publishing.shard_bytes)
    files = []
    for number, names in enumerate(groups, start=1):
        inside = sorted((tensors[name] for name in names), key=lambda tensor: -tensor.dtype.itemsize)  # stable
        files.append(WeightFile(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(inside)))
    return files


def plan_shards(sizes: Iterable[tuple[str, int]], limit: int) -> list[list[str]]:
    """Names in order, cut into groups of at most `limit` bytes; a larger tensor is alone in its group."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes:
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def index_of(files: list[WeightFile]) -> dict[str, Any]:
    """model.safetensors.index.json"""
    tensors = [(file.name, tensor) for file in files for tensor in file.tensors]
    return {
        "metadata": {
            "total_parameters": sum(prod(tensor.shape) for _, tensor in tensors),
            "total_size": sum(tensor.nbytes for _, tensor in tensors),
        },
        "weight_map": {tensor.name: file for file, tensor in tensors},
    }
