"""One gradient norm over parameters that live on different meshes.

PyTorch's `clip_grad_norm_` refuses a mixture of meshes (FSDP and expert parallelism), and a norm per mesh is easily
averaged where it should be summed, or differs between expert groups so that replicas drift apart. The rule here is the
plain one: every element of every gradient counts once. A rank adds the squares of what it holds; each element is held
by `replicas` ranks (the replicate axis copies, the other axes cut), so

    norm^2 = (sum over all ranks of local squares) / replicas

The caller reduces it with the other statistics of the step in one all-reduce over all ranks, whose result is the same
bits everywhere. Cost: one read of the gradients, no communication of its own, no host synchronisation.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.parallel.local import local_tensor

EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


def local_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The part of each gradient that this rank holds, as plain tensors that share memory with it."""
    return [local_tensor(parameter.grad) for parameter in parameters if parameter.grad is not None]


def local_squared_norm(gradients: list[Tensor], replicas: int) -> Tensor:
    """This rank's share of the squared norm: a float64 scalar whose sum over all ranks is norm^2."""
    assert gradients, "no parameter has a gradient"
    norms = torch.stack(torch._foreach_norm(gradients, 2.0)).double()
    return norms.square().sum() / replicas


def clip_(gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale the gradients in place so that their norm is at most `max_norm`; 0 means no clipping.

    `norm` stays on the device. A non-finite norm makes the gradients non-finite; the guard skips such a step.
    """
    if max_norm > 0:
        torch._foreach_mul_(gradients, (max_norm / (norm + EPS)).clamp(max=1.0).float())
