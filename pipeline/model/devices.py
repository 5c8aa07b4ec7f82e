"""Which devices are GPUs: CUDA's, and the stand-in of a rehearsal (pipeline/rehearsal), which takes the same branches. Which of them multiply
fp8."""

from __future__ import annotations

import torch

GPUS = frozenset({"cuda", "gpu"})


def is_gpu(device: torch.device) -> bool:
    return device.type in GPUS


E4M3_FROM = (8, 9)  # NVIDIA's compute capability


def check_fp8(device: torch.device) -> None:
    """Raises ValueError for a GPU without products of e4m3 (fn) numbers. AMD's MI300 has them of another e4m3 (fnuz), with other scales."""
    if device.type != "cuda":
        return  # a CPU multiplies what the numbers stand for
    whose = f"training.expert_products fp8: the device {torch.cuda.get_device_name(device)}"
    remedy = "train on H100, H200, B200, L40S or later, or set it to compute_dtype"
    if torch.version.hip:
        raise ValueError(f"{whose} is AMD's, and e4m3 (fn) products are here for NVIDIA's alone; {remedy}")
    if (capability := torch.cuda.get_device_capability(device)) < E4M3_FROM:
        told, needed = (".".join(map(str, version)) for version in (capability, E4M3_FROM))
        raise ValueError(f"{whose} has compute capability {told}, and e4m3 products come with {needed}; {remedy}")
