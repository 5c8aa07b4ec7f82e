"""When kernels of our own run: on CUDA with Triton, and on a rehearsal's stand-in, which stands for both.

Each kernel is an operator `moonlight::...` with the plain PyTorch function beside it, which is its reference, the CPU's way
and the way of a GPU without Triton. An operator is a border: nothing is fused over it, and a rehearsal counts it as one
kernel that reads its inputs and writes its results once.
"""

from __future__ import annotations

import functools
import importlib.util

from torch import Tensor

from pipeline.model.devices import is_gpu


def own_kernels(x: Tensor) -> bool:
    """Whether what is computed from `x` goes to kernels of our own."""
    return is_gpu(x.device) and (x.device.type != "cuda" or triton_is_here())


@functools.cache
def triton_is_here() -> bool:
    """PyTorch's CUDA builds for Linux bring it."""
    return importlib.util.find_spec("triton") is not None
