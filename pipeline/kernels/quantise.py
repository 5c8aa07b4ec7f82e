"""Numbers in e4m3, eight bits each, with a scale for each tile: rows in tiles of 1 x 128, stacks of weights in blocks of 128 x 128.

e4m3 (fn) has 3 bits of mantissa and reaches from 2^-9 to 448. A tile's scale is the power of two that brings its largest number
into (224, 448]: multiplying by it rounds nothing, so every device finds the same bits, and a number of the tile is off by at most
2^-4 of itself or 2^-10 of the scale, whichever is more. One outlier costs its tile its smallest numbers, and no other tile anything.
A tile of zeros has the smallest scale. A tile that holds something not finite has the scale NaN, and with it all that is computed
from it, so a step that has to be skipped still shows.

Tiles lie along the direction that a product sums over; where this is made of `parts` laid end to end (gate and up), no tile reaches
over the border of two, and the last one of each may be shorter.

Sources: Micikevicius et al., FP8 formats for deep learning, arXiv 2209.05433; the tiles are DeepSeek-V3's, arXiv 2412.19437, section 3.3.

Legend: M rows, K numbers of a row that a product sums over, T tiles of a row, e experts, N columns of a product, B blocks of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.kernels.choice import own_kernels
from pipeline.kernels.e4m3 import BELOW_448, E4M3, INFINITE, LEAST, TILE, room_for_stacks, tiles_of


class Quantised(NamedTuple):
    """Rows: values [M, K], scales [T, M]. A stack: values [e, N, K], scales [e, B, T]. What it stands for: value times scale."""

    values: Tensor  # e4m3
    scales: Tensor  # fp32


def quantised_rows(
    x_RK: Tensor, row_M: Tensor | None = None, counts_B: Tensor | None = None, slots: int = 0, parts: int = 1
) -> Quantised:
    """x_RK[row_M], or x_RK itself. Of each `slots` places the first `counts_B` are filled, and kernels of our own pass over the
    others (pipeline/parallel/rows.py); None: all are."""
    if own_kernels(x_RK):
        return Quantised(*torch.ops.moonlight.quantised_rows(x_RK, row_M, counts_B, slots, parts))
    return plain_rows(x_RK if row_M is None else x_RK.index_select(0, row_M), parts)


def quantised_stacks(stacks: Sequence[Tensor], *, transposed: bool) -> Quantised:
    """Stacks [e, O, I] beside each other in the last dim, each the other way round if `transposed`: [e, I, O of all]."""
    if own_kernels(stacks[0]):
        return Quantised(*torch.ops.moonlight.quantised_stacks(list(stacks), transposed))
    return plain_stacks(stacks, transposed=transposed)


def plain_rows(x_MK: Tensor, parts: int = 1) -> Quantised:
    M, K = x_MK.shape
    x_MPT8 = _in_tiles(x_MK.float().reshape(M, parts, K // parts))
    scale, inverse = _scales(_bits(x_MPT8).amax(-1))
    values = _e4m3(x_MPT8, inverse.unsqueeze(-1)).flatten(2)[:, :, : K // parts].reshape(M, K)
    return Quantised(values.contiguous(), scale.flatten(1).T.contiguous())


def plain_stacks(stacks: Sequence[Tensor], *, transposed: bool) -> Quantised:
    found = [_plain_stack(stack.transpose(1, 2) if transposed else stack) for stack in stacks]
    return Quantised(*(torch.cat(kind, dim=2) for kind in zip(*found)))


def _plain_stack(weight_eNK: Tensor) -> Quantised:
    _, N, K = weight_eNK.shape
    rows = F.pad(weight_eNK.float(), (0, 0, 0, -N % TILE))
    x_eB8T8 = _in_tiles(rows).unflatten(1, (tiles_of(N), TILE))
    scale_eBT, inverse_eBT = _scales(_bits(x_eB8T8).amax((2, 4)))
    values = _e4m3(x_eB8T8, inverse_eBT[:, :, None, :, None]).flatten(3).flatten(1, 2)[:, :N, :K]
    return Quantised(values.contiguous(), scale_eBT)


def rows_in_fp32(rows: Quantised, parts: int = 1) -> Tensor:
    """What quantised rows stand for, [M, K]."""
    M, K = rows.values.shape
    values = _in_tiles(rows.values.float().view(M, parts, K // parts))
    return (values * rows.scales.T.reshape(*values.shape[:3], 1)).flatten(2)[:, :, : K // parts].reshape(M, K)


def stack_in_fp32(stack: Quantised, parts: int = 1) -> Tensor:
    """What a quantised stack stands for, [e, N, K]."""
    e, N, K = stack.values.shape
    values = _in_tiles(stack.values.float().view(e, N, parts, K // parts))
    scales = stack.scales.repeat_interleave(TILE, dim=1)[:, :N].reshape(*values.shape[:4], 1)
    return (values * scales).flatten(3)[..., : K // parts].reshape(e, N, K)


def _in_tiles(x: Tensor) -> Tensor:
    """[..., K] to [..., T, 128], with zeros behind the end."""
    return F.pad(x, (0, -x.shape[-1] % TILE)).unflatten(-1, (tiles_of(x.shape[-1]), TILE))


def _bits(x: Tensor) -> Tensor:
    """Of magnitudes in fp32: integers in the same order, NaN last."""
    return x.contiguous().view(torch.int32) & 0x7FFFFFFF


def _scales(largest: Tensor) -> tuple[Tensor, Tensor]:
    """(scales, what to multiply with) of tiles by the bits of their largest numbers."""
    finite = largest < INFINITE
    exponent = ((largest.clamp(min=LEAST) + BELOW_448) >> 23) - 8
    scale, inverse = ((each << 23).view(torch.float32) for each in (exponent, 254 - exponent))
    return scale.where(finite, torch.nan), inverse.where(finite, 0.0)


def _e4m3(x: Tensor, inverse: Tensor) -> Tensor:
    return torch.where(inverse > 0, x * inverse, 0.0).to(E4M3)


@torch.library.custom_op("moonlight::quantised_rows", mutates_args=(), device_types="cuda")
def _quantised_rows(
    x_RK: Tensor, row_M: Tensor | None, counts_B: Tensor | None, slots: int, parts: int
) -> tuple[Tensor, Tensor]:
    from pipeline.kernels.quantise_triton import quantised_rows

    return quantised_rows(x_RK, row_M, counts_B, slots, parts)


@_quantised_rows.register_fake
def _(x_RK: Tensor, row_M: Tensor | None, counts_B: Tensor | None, slots: int, parts: int) -> tuple[Tensor, Tensor]:
    M, K = (x_RK if row_M is None else row_M).shape[0], x_RK.shape[1]
    return x_RK.new_empty(M, K, dtype=E4M3), x_RK.new_empty(tiles_of(K, parts), M, dtype=torch.float32)


@torch.library.custom_op("moonlight::quantised_stacks", mutates_args=(), device_types="cuda")
def _quantised_stacks(stacks: list[Tensor], transposed: bool) -> tuple[Tensor, Tensor]:
    from pipeline.kernels.quantise_triton import quantised_stacks

    return quantised_stacks(stacks, transposed)


@_quantised_stacks.register_fake
def _(stacks: list[Tensor], transposed: bool) -> tuple[Tensor, Tensor]:
    return room_for_stacks(stacks, transposed)
