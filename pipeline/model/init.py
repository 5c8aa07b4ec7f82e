"""Deterministic initial weights: normal with a given deviation, norm gains one.

The numbers of a parameter depend on the seed and its name alone: not on the order of creation, the device, the number
of ranks or how it is sharded, and between processors of different vector units on these in the last bits only, since
torch's draw has a kernel of its own for AVX2 (findings/torch_normal_depends_on_vector_unit.sh). A stack of experts draws each expert from a stream of its own, so a rank draws only the
experts it holds; of any other sharded tensor a rank draws the whole and keeps its part, one tensor at a time. Drawn on
the CPU in fp32, about 10 ns a number.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from pipeline.parallel.local import local_part, local_tensor


def initialise(parameter: Tensor, name: str, seed: int, std: float) -> None:
    """Fill the parameter (or the shard of it that is here) in place."""
    target, part = local_tensor(parameter), local_part(parameter)
    if parameter.dim() == 1:
        target.fill_(1.0)
    elif parameter.dim() == 2:
        target.copy_(_normal(tuple(parameter.shape), std, f"{seed}/{name}")[part])
    else:
        experts = range(parameter.shape[0])[part[0]]
        for row, expert in enumerate(experts):
            target[row].copy_(_normal(tuple(parameter.shape[1:]), std, f"{seed}/{name}/{expert}")[part[1:]])


def _normal(shape: tuple[int, ...], std: float, stream: str) -> Tensor:
    key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little") >> 1
    return torch.empty(shape).normal_(0.0, std, generator=torch.Generator().manual_seed(key))
