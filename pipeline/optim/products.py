"""Which matrix products a processor has, and one thread a matrix where bits have to be the matrix's alone.

torch multiplies 16-bit matrices on every device, but a CPU without kernels for them does it element by element: 3 GFLOP/s
where fp32 products reach 80. oneDNN knows whether it has kernels: bf16 on x86 with AVX-512 and on ARM with the bf16
extension, fp16 on fewer. A CUDA device has bf16 products from compute capability 8.0 on. What is unknown here counts as
lacking them: fp32 products are right and fast everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Products = Literal["half", "fp32"]
NOTHING = frozenset({"meta", "gpu"})  # devices that compute nothing: gpu is the stand-in of a rehearsal
_HALF = {"plain": torch.bfloat16, "gram": torch.float16}


def choose(
    setting: Literal["auto", "half", "fp32"],
    backend: Literal["plain", "gram"],
    device: torch.device,
    groups: Sequence[dist.ProcessGroup] = (),
) -> Products:
    """The products that Newton-Schulz uses, the same on every rank.

    `groups`: process groups of this rank, one a mesh axis; where one device lacks 16-bit products all use fp32.
    Raises ValueError if a device lacks those that the setting forces.
    """
    dtype = _HALF[backend]
    lacks = not has_products(device.type, dtype)
    if groups and device.type not in NOTHING:
        any_lacks = torch.tensor(lacks, dtype=torch.int32, device=device)
        for group in groups:
            dist.all_reduce(any_lacks, dist.ReduceOp.MAX, group=group)
        lacks = bool(any_lacks.item())
    if setting == "fp32":
        return "fp32"
    if device.type in NOTHING or not lacks:
        return "half"
    if setting == "half":
        whose = describe(device) if not has_products(device.type, dtype) else "the device of another rank"
        raise ValueError(
            f"optimizer.muon.products is 'half', but {whose} has no {name(dtype)} matrix product, which "
            f"optimizer.muon.backend {backend!r} needs; set products to 'auto' or 'fp32'"
        )
    return "fp32"


def dtype_of(products: Products, backend: Literal["plain", "gram"]) -> str:
    """What is multiplied, by name: bf16, fp16 or fp32."""
    return name(torch.float32 if products == "fp32" else _HALF[backend])


@functools.cache
def has_products(device_type: str, dtype: torch.dtype) -> bool:
    """Whether devices of this type multiply matrices of a 16-bit dtype by kernels of their own."""
    if device_type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu" and torch.backends.mkldnn.is_available():
        known = torch.ops.mkldnn
        return bool(known._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else known._is_mkldnn_fp16_supported())
    return device_type in NOTHING


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"the device {torch.cuda.get_device_name(device)}"
    return (
        f"this {device.type} device ({torch.backends.cpu.get_cpu_capability()})"
        if device.type == "cpu"
        else f"{device}"
    )


def name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def one_thread_each(work: Callable[[Tensor], Tensor], tensors: Iterable[Tensor]) -> list[Tensor]:
    """`work` on every tensor, each on a single thread, on a CPU as many at a time as torch has threads.

    The libraries under torch share one product or sum out among their threads in ways that change the last bit.
    """
    tensors = list(tensors)
    threads = torch.get_num_threads()
    if threads == 1 or not tensors or tensors[0].device.type != "cpu":
        return [work(tensor) for tensor in tensors]
    torch.set_num_threads(1)
    try:
        return list(_workers(threads).map(work, tensors))
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _workers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="newton-schulz")
