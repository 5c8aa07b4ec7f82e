"""Linear layers, and the matrix product under them that is fast on every CPU.

PyTorch multiplies fp32 matrices on a CPU with MKL, which takes its AVX2 kernels on AMD processors. oneDNN, which is in
every x86 build of PyTorch, uses the whole vector width there. GFLOP/s on one thread, 512 to 4096 rows:

    AMD with 512-bit units (Zen 5)      MKL 113     oneDNN 260
    AMD with 256-bit units (Zen 4)      MKL 90      oneDNN 105
    Intel with AVX-512                  MKL 150     oneDNN 135

So fp32 products on AMD go to oneDNN here unless they are too small to pay its call (26 microseconds). Everything else is
plain PyTorch: Intel, ARM, CUDA, bf16, builds without oneDNN. The choice is the processor's, never a measurement's: a run
that is started again on the same kind of machine multiplies the same way.

oneDNN compiles and keeps a kernel for every shape it meets: about a millisecond and a megabyte each. Token counts of
experts, and prompts that grow, would meet new shapes for ever. So rows are cut into tiles of three sizes, and the rest,
fewer than 128, goes to MKL.

The linear layer is an operator of its own, so that torch.compile and activation checkpointing see one node.

Legend: M rows, I in, O out.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.model.devices import is_gpu

TILES = (4096, 512, 128)  # rows
SMALLEST = 1 << 20  # multiply-adds: below, oneDNN's call costs more than it gains


class Linear(nn.Linear):
    """A linear layer without bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x [..., I] times the transposed weight -> [..., O]."""
    if not is_cpu_fp32(x):
        return F.linear(x, weight_OI)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _linear(x, weight_OI)
    return product(x.reshape(-1, x.shape[-1]), weight_OI).view(
        *x.shape[:-1], weight_OI.shape[0]
    )  # an operator costs 30 us


def fp32_linear(x_MI: Tensor, weight_OI: Tensor) -> Tensor:
    """x times the transposed weight in fp32, [M, O]: operands in bf16 are multiplied as such and summed in fp32.

    Its gradients are products in the operands' dtype, of the gradient that arrives rounded to it.
    """
    if is_cpu_fp32(x_MI):
        return linear(x_MI, weight_OI)
    return _Fp32Linear.apply(x_MI, weight_OI)


class _Fp32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_MI, weight_OI)
        return fp32_product(x_MI, weight_OI)

    @staticmethod
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor, Tensor]:
        x_MI, weight_OI = ctx.saved_tensors
        grad_MO = grad_MO.to(x_MI.dtype)
        return grad_MO @ weight_OI, grad_MO.T @ x_MI


def fp32_product(x_MI: Tensor, weight_OI: Tensor) -> Tensor:
    """`fp32_linear` without autograd."""
    if is_cpu_fp32(x_MI):
        return product(x_MI, weight_OI)
    if is_gpu(x_MI.device) and x_MI.dtype != torch.float32:
        return torch.mm(x_MI, weight_OI.T, out_dtype=torch.float32)
    return x_MI.float() @ weight_OI.float().T


def is_cpu_fp32(x: Tensor) -> bool:
    """Whether `product` is the way to multiply this tensor."""
    return x.device.type == "cpu" and x.dtype == torch.float32


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this processor's fp32 products are for oneDNN."""
    return torch.backends.mkldnn.is_available() and "AMD" in torch.cpu.get_capabilities().get("cpu_name", "")


def product(x_MI: Tensor, weight_OI: Tensor, out_MO: Tensor | None = None) -> Tensor:
    """x times the transposed weight, [M, O], without autograd. Either may be a transposed view. `out_MO`: write there."""
    if not (is_cpu_fp32(x_MI) and onednn_is_faster()):
        return torch.mm(x_MI, weight_OI.T, out=out_MO)
    M, O = x_MI.shape[0], weight_OI.shape[0]  # noqa: E741
    tiles = _tiles(M, weight_OI.numel())
    if len(tiles) == 1 and out_MO is None:
        return _multiply(x_MI, weight_OI, tiles[0])
    out_MO = x_MI.new_empty(M, O) if out_MO is None else out_MO
    for rows in tiles:
        out_MO[rows] = _multiply(x_MI[rows], weight_OI, rows)
    return out_MO


def outer(grad_MO: Tensor, x_MI: Tensor) -> Tensor:
    """grad transposed times x, [O, I], without autograd: the gradient of a weight."""
    if not (is_cpu_fp32(x_MI) and onednn_is_faster()):
        return grad_MO.T @ x_MI
    if grad_MO.shape[1] > x_MI.shape[1]:  # oneDNN lays out the first factor anew: let that be the narrower one
        return outer(x_MI, grad_MO).T.contiguous()
    first, *others = _tiles(grad_MO.shape[0], grad_MO.shape[1] * x_MI.shape[1])
    out_OI = _multiply(grad_MO[first].T, x_MI[first].T, first)
    for rows in others:
        out_OI += _multiply(grad_MO[rows].T, x_MI[rows].T, rows)
    return out_OI


def _tiles(M: int, per_row: int) -> list[slice]:
    """All rows, cut into tiles of a few sizes and one rest."""
    tiles, start = [], 0
    for size in TILES:
        while M - start >= size and size * per_row >= SMALLEST:
            tiles.append(slice(start, start + size))
            start += size
    return tiles if start == M and tiles else [*tiles, slice(start, M)]


def _multiply(x_MI: Tensor, weight_OI: Tensor, tile: slice) -> Tensor:
    """oneDNN for a whole tile of rows, MKL for a rest."""
    (M, I), O = x_MI.shape, weight_OI.shape[0]  # noqa: E741
    whole = tile.stop - tile.start in TILES and M * I * O >= SMALLEST
    if not whole:
        return x_MI @ weight_OI.T
    return _onednn(x_MI, _dense(weight_OI))


def _dense(weight_OI: Tensor) -> Tensor:
    """Without gaps between rows or columns. oneDNN has a fast kernel for no other second factor: the half of a wider matrix, which is how gradients
    of gate and up come, took 1,700 times as long (torch 2.13.0; findings/onednn_factor_with_gaps.sh). The first one may be anything."""
    if weight_OI.is_contiguous() or weight_OI.T.is_contiguous():
        return weight_OI
    return weight_OI.T.contiguous().T if weight_OI.stride(0) == 1 else weight_OI.contiguous()


def _onednn(x_MI: Tensor, weight_OI: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x_MI, weight_OI, None, "none", [], "")
    return found


@torch.library.custom_op("moonlight::linear", mutates_args=())
def _linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """F.linear for fp32 on a CPU; x of any shape [..., I]."""
    return product(x.reshape(-1, x.shape[-1]), weight_OI).view(*x.shape[:-1], weight_OI.shape[0])


@torch.library.custom_op("moonlight::linear_backward", mutates_args=())
def _linear_backward(grad: Tensor, x: Tensor, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    grad_MO, x_MI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    return product(grad_MO, weight_OI.T).view(x.shape), outer(grad_MO, x_MI)


@_linear.register_fake
def _(x: Tensor, weight_OI: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_OI.shape[0])


@_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight_OI)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _linear_backward(grad, *ctx.saved_tensors)


_linear.register_autograd(_differentiate, setup_context=_save)
