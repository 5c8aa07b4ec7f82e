"""Matrix products of rows sorted by expert with a stack of weights: `torch.nn.functional.grouped_mm`, made safe.

grouped_linear(x_MI, weight_eOI, offsets_e): rows up to offsets_e[0] times expert 0's weight (transposed, as in a linear
layer), the next ones expert 1's, and so on -> y_MO. Its gradients are the same product with the weight the other way round
(`transpose` false) for x, and `grouped_outer`, one outer product a group, for the weight. 2*M*I*O FLOPs each. Who computes
them when is pipeline/model/expert_products.py's to say: autograd stops here.

In fp32 on a CPU, where PyTorch's function is a loop over experts, too, the loop is ours and takes the faster product of
pipeline/model/matmul.py. Things that the plain function leaves open are settled here:
- Gradients of experts without rows are zero. Kernels for NVIDIA's compute capability 10 leave something else there
  (pytorch issue 172439), older ones do not: clearing costs a pass over the gradients, so only the former pay it.
- A rank may have no rows at all, which the CUDA function refuses (pytorch pull request 192497).
- An incoming gradient that is an expanded tensor is made contiguous first; the kernel refuses it.
Elsewhere both are operators of their own, whose shapes are known without a device.

The offsets must end at M: what lies behind the last one would stay uninitialised. Rows must be multiples of 16 bytes.

Legend: M rows, I in, O out, e experts on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.model.matmul import is_cpu_fp32, outer, product

ALIGNMENT = 8  # numbers: 16 bytes in bf16


def grouped_linear(x_MI: Tensor, weight_eOI: Tensor, offsets_e: Tensor, *, transpose: bool = True) -> Tensor:
    """y_MO: each row times its expert's weight, transposed or not; `offsets_e` int32, the cumulative rows of the experts, ending at M."""
    if is_cpu_fp32(x_MI):  # an operator costs 30 us
        out_MO = x_MI.new_empty(x_MI.shape[0], weight_eOI.shape[-2 if transpose else -1])
        for expert, rows in groups(offsets_e):
            product(x_MI[rows], weight_eOI[expert] if transpose else weight_eOI[expert].T, out_MO[rows])
        return out_MO
    return _rows(x_MI.contiguous(), weight_eOI, offsets_e, transpose)


def grouped_outer(grad_MO: Tensor, x_MI: Tensor, offsets_e: Tensor) -> Tensor:
    """grad^T x over each expert's rows, [e, O, I]; zero without rows."""
    if is_cpu_fp32(x_MI):
        out_eOI = x_MI.new_zeros(offsets_e.shape[0], grad_MO.shape[1], x_MI.shape[1])
        for expert, rows in groups(offsets_e):
            out_eOI[expert] = outer(grad_MO[rows], x_MI[rows])
        return out_eOI
    return _outer(grad_MO.contiguous(), x_MI, offsets_e)


@torch.library.custom_op("moonlight::grouped_rows", mutates_args=())
def _rows(x_MI: Tensor, weight_eOI: Tensor, offsets_e: Tensor, transpose: bool) -> Tensor:
    if x_MI.shape[0] == 0:
        return x_MI.new_empty(0, weight_eOI.shape[-2 if transpose else -1])
    return F.grouped_mm(x_MI, weight_eOI.transpose(-2, -1) if transpose else weight_eOI, offs=offsets_e)


@torch.library.custom_op("moonlight::grouped_outer", mutates_args=())
def _outer(grad_MO: Tensor, x_MI: Tensor, offsets_e: Tensor) -> Tensor:
    if x_MI.shape[0] == 0:
        return x_MI.new_zeros(offsets_e.shape[0], grad_MO.shape[1], x_MI.shape[1])
    grad_eOI = F.grouped_mm(grad_MO.transpose(0, 1), x_MI, offs=offsets_e)
    if x_MI.is_cuda and torch.cuda.get_device_capability(x_MI.device)[0] < 10:
        return grad_eOI
    empty_e = offsets_e == F.pad(offsets_e, (1, 0))[:-1]
    return grad_eOI.masked_fill_(empty_e[:, None, None], 0)


@_rows.register_fake
def _(x_MI: Tensor, weight_eOI: Tensor, offsets_e: Tensor, transpose: bool) -> Tensor:
    return x_MI.new_empty(x_MI.shape[0], weight_eOI.shape[-2 if transpose else -1])


@_outer.register_fake
def _(grad_MO: Tensor, x_MI: Tensor, offsets_e: Tensor) -> Tensor:
    return x_MI.new_empty(offsets_e.shape[0], grad_MO.shape[1], x_MI.shape[1])


def groups(offsets_e: Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, with their rows."""
    start = 0
    for expert, end in enumerate(offsets_e.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end
