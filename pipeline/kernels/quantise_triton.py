"""The kernels that quantise; what they compute: quantise.py.

Rounding to e4m3 is written out, on the bits of fp32, and the cast that follows is exact: Triton's interpreter rounds otherwise than a GPU.

Legend: as quantise.py; R rows and C columns of a stack as it is given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.e4m3 import BELOW_448, E4M3, INFINITE, LEAST, TILE, room_for_stacks, tiles_of

ROWS, TILES = 4, 8  # of a program

_INFINITE, _LEAST, _BELOW_448 = tl.constexpr(INFINITE), tl.constexpr(LEAST), tl.constexpr(BELOW_448)


def quantised_rows(
    x_RK: Tensor, row_M: Tensor | None, counts_B: Tensor | None, slots: int, parts: int
) -> tuple[Tensor, Tensor]:
    x_RK = x_RK.contiguous()
    M, K = (x_RK if row_M is None else row_M).shape[0], x_RK.shape[1]
    tiles = tiles_of(K, parts)
    values = torch.empty(M, K, dtype=E4M3, device=x_RK.device)
    scales = torch.empty(tiles, M, dtype=torch.float32, device=x_RK.device)
    if values.numel():
        grid = (triton.cdiv(M, ROWS), triton.cdiv(tiles, TILES))
        _rows[grid](
            x_RK, row_M, counts_B, values, scales, M, K // parts, tiles // parts, tiles, max(slots, 1),
            row_M is not None, counts_B is not None, parts, ROWS, TILES, TILE,
        )  # fmt: skip
    return values, scales


def quantised_stacks(stacks: Sequence[Tensor], transposed: bool) -> tuple[Tensor, Tensor]:
    values, scales = room_for_stacks(stacks, transposed)
    (e, O, I), parts = stacks[0].shape, len(stacks)  # noqa: E741
    if values.numel():
        grid = (e, triton.cdiv(O, TILE), triton.cdiv(I, TILE))
        for part, stack in enumerate(stacks):
            _block[grid](
                stack.contiguous(),
                values,
                scales,
                O,
                I,
                part,
                parts * (O if transposed else I),
                *scales.shape[1:],
                transposed,
                TILE,
            )
    return values, scales


@triton.jit
def _magnitude(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _exponent(largest):
    return ((tl.maximum(largest, _LEAST) + _BELOW_448) >> 23) - 8


@triton.jit
def _scale(largest):
    """fp32, from the bits of a tile's largest number."""
    bits = tl.where(largest < _INFINITE, _exponent(largest) << 23, 0x7FC00000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _rounded(x, largest):
    """x over the scale, to the nearest number that e4m3 has; of two the even one."""
    inverse = ((254 - _exponent(largest)) << 23).to(tl.float32, bitcast=True)
    x = tl.where(largest < _INFINITE, x * inverse, 0.0)
    bits = x.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000  # three bits of mantissa stay
    small = (tl.abs(x) + 24576.0) - 24576.0  # below 2^-6 numbers are 2^-9 apart, as fp32's are around 1.5 * 2^14
    small = small.to(tl.int32, bitcast=True) | (bits & -0x80000000)
    return tl.where(tl.abs(x) < 0.015625, small, normal).to(tl.float32, bitcast=True).to(tl.float8e4nv)


@triton.jit
def _rows(
    x, rows, counts, values, scales, M, width, tiles_of_part, T, slots,
    GATHERED: tl.constexpr, BOUNDED: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = place < M
    if BOUNDED:
        there = there & (place % slots < tl.load(counts + place // slots, there, 0))
    if tl.sum(there.to(tl.int32), 0) > 0:
        row = place.to(tl.int64)
        if GATHERED:
            row = tl.load(rows + place, there, 0)
        tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
        column = ((tile % tiles_of_part) * TILE)[:, None] + tl.arange(0, TILE)[None, :]
        inside = there[:, None, None] & ((tile < T)[:, None] & (column < width))[None, :, :]
        at = ((tile // tiles_of_part) * width)[:, None] + column
        read = tl.load(x + row[:, None, None] * (PARTS * width) + at[None, :, :], inside, 0.0).to(tl.float32)
        largest = tl.max(_magnitude(read), 2)
        write = place.to(tl.int64)[:, None, None] * (PARTS * width) + at[None, :, :]
        tl.store(values + write, _rounded(read, largest[:, :, None]), inside)
        kept = there[:, None] & (tile < T)[None, :]
        tl.store(scales + tile.to(tl.int64)[None, :] * M + place[:, None], _scale(largest), kept)


@triton.jit
def _block(
    stack, values, scales, R, C, part, width, B, T, TRANSPOSED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = tl.program_id(2) * TILE + tl.arange(0, TILE)
    inside = (row < R)[:, None] & (column < C)[None, :]
    x = tl.load(stack + (expert * R + row[:, None]) * C + column[None, :], inside, 0.0).to(tl.float32)
    largest = tl.max(_magnitude(x))
    rounded = _rounded(x, largest)
    if TRANSPOSED:
        n, k = column, row
        block, tile = tl.program_id(2), part * tl.cdiv(R, TILE) + tl.program_id(1)
        rows, first = C, part * R
        rounded, inside = tl.trans(rounded), tl.trans(inside)
    else:
        n, k = row, column
        block, tile = tl.program_id(1), part * tl.cdiv(C, TILE) + tl.program_id(2)
        rows, first = R, part * C
    tl.store(values + (expert * rows + n[:, None]) * width + first + k[None, :], rounded, inside)
    tl.store(scales + (expert * B + block) * T + tile, _scale(largest))
