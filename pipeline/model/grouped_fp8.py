"""Matrix products of quantised rows, sorted by expert, with a quantised stack of weights.

    y_MN[m, n] = sum over k of x[m, k] w[e, n, k],    e the expert of row m

as `grouped_linear`, of numbers in e4m3 with the scales of their tiles (pipeline/kernels/quantise.py), summed in fp32 and rounded once.
Where a row is made of `parts`, so are those of the weights.

On CUDA a kernel of our own multiplies, as torch's grouped product of scaled numbers (2.13: `torch.nn.functional.scaled_grouped_mm`) takes one scale
a row or one for each 32 numbers of the MX formats, but not tiles with blocks, which only its ungrouped `scaled_mm` does. The plain function is the reference,
the CPU's way and that of a GPU without Triton: it multiplies what the numbers stand for in fp32, expert by expert, and the host reads the offsets.

The offsets may end before M: what lies behind the last one holds anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.choice import own_kernels
from pipeline.kernels.quantise import Quantised, rows_in_fp32, stack_in_fp32
from pipeline.model.grouped import groups
from pipeline.model.matmul import product


def grouped_fp8(rows: Quantised, stack: Quantised, offsets_e: Tensor, dtype: torch.dtype, parts: int = 1) -> Tensor:
    """y_MN in `dtype`; `offsets_e` int32, the cumulative rows of the experts."""
    if own_kernels(rows.values):
        return torch.ops.moonlight.grouped_fp8(*rows, *stack, offsets_e, parts, dtype)
    return plain_grouped_fp8(rows, stack, offsets_e, dtype, parts)


def plain_grouped_fp8(
    rows: Quantised, stack: Quantised, offsets_e: Tensor, dtype: torch.dtype, parts: int = 1
) -> Tensor:
    x_MK, weight_eNK = rows_in_fp32(rows, parts), stack_in_fp32(stack, parts)
    y_MN = x_MK.new_empty(x_MK.shape[0], weight_eNK.shape[1])
    for expert, group in groups(offsets_e):
        product(x_MK[group], weight_eNK[expert], y_MN[group])
    return y_MN.to(dtype)


@torch.library.custom_op("moonlight::grouped_fp8", mutates_args=(), device_types="cuda")
def _grouped_fp8(
    x_MK: Tensor,
    scales_TM: Tensor,
    weight_eNK: Tensor,
    scales_eBT: Tensor,
    offsets_e: Tensor,
    parts: int,
    dtype: torch.dtype,
) -> Tensor:
    from pipeline.kernels.grouped_fp8_triton import grouped_fp8

    return grouped_fp8(x_MK, scales_TM, weight_eNK, scales_eBT, offsets_e, parts, dtype)


@_grouped_fp8.register_fake
def _(
    x_MK: Tensor,
    scales_TM: Tensor,
    weight_eNK: Tensor,
    scales_eBT: Tensor,
    offsets_e: Tensor,
    parts: int,
    dtype: torch.dtype,
) -> Tensor:
    return x_MK.new_empty(x_MK.shape[0], weight_eNK.shape[1], dtype=dtype)
