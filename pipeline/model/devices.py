"""Which devices are GPUs: CUDA's, and the stand-in of a rehearsal (pipeline/rehearsal), which takes the same branches."""

from __future__ import annotations

import torch

GPUS = frozenset({"cuda", "gpu"})


def is_gpu(device: torch.device) -> bool:
    return device.type in GPUS
