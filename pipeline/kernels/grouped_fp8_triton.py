"""The grouped product of quantised rows and stacks; what it computes: pipeline/model/grouped_fp8.py.

A program computes a tile of ROWS x COLUMNS results. Which rows and whose, it finds from the offsets on the device: an expert has as
many tiles of rows as its rows fill, so at most M / ROWS + e are launched, and those behind the last one end at once. For each 128
numbers of the sum the matrix units multiply e4m3 into fp32, starting from zero, and the scales of both tiles multiply that on its way
into the result's own fp32 sum: Hopper's units add e4m3 products up with some 14 bits, which is enough for 128 of them and for no more
(DeepSeek-V3, arXiv 2412.19437, section 3.3.2). Both factors have the numbers of a sum side by side in memory, the only way that these
units take e4m3.

Programs next to each other share rows or weights: GROUP tiles of rows meet all columns before the next ones come.

Legend: M rows, N columns, K numbers of a sum, T tiles of them, e experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.e4m3 import TILE

ROWS, GROUP = 128, 8


def grouped_fp8(
    x_MK: Tensor,
    scales_TM: Tensor,
    weight_eNK: Tensor,
    scales_eBT: Tensor,
    offsets_e: Tensor,
    parts: int,
    dtype: torch.dtype,
) -> Tensor:
    (M, K), (e, N, _) = x_MK.shape, weight_eNK.shape
    y_MN = torch.empty(M, N, dtype=dtype, device=x_MK.device)
    if y_MN.numel():
        row_tiles, column_tiles = triton.cdiv(M, ROWS) + e, triton.cdiv(N, TILE)
        _product[(row_tiles * column_tiles,)](
            x_MK, scales_TM, weight_eNK, scales_eBT, offsets_e, y_MN, M, N, K // parts, e, row_tiles, column_tiles,
            scales_eBT.shape[2], parts, K // parts % TILE == 0, triton.next_power_of_2(e), ROWS, TILE, GROUP,
            num_warps=8, num_stages=3,
        )  # fmt: skip
    return y_MN


@triton.jit
def _product(
    x, x_scales, weight, weight_scales, offsets, y, M, N, width, e, row_tiles, column_tiles, T,
    PARTS: tl.constexpr, EVEN: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    first = program // (GROUP * column_tiles) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    inner = program % (GROUP * column_tiles)
    row_tile, column_tile = first + inner % height, inner // height

    each = tl.arange(0, EXPERTS)
    end = tl.load(offsets + each, each < e, 0)
    begin = tl.load(offsets + each - 1, (each > 0) & (each < e), 0)
    tiles = (end - begin + ROWS - 1) // ROWS
    upto = tl.cumsum(tiles, 0)
    if row_tile < tl.sum(tiles, 0):
        expert = tl.sum((upto <= row_tile).to(tl.int32), 0)
        mine = each == expert
        start = tl.sum(tl.where(mine, begin + (row_tile - upto + tiles) * ROWS, 0), 0)
        stop = tl.sum(tl.where(mine, end, 0), 0)
        row = start + tl.arange(0, ROWS)
        read = tl.minimum(row, stop - 1).to(tl.int64)  # behind the end the last row again, and nothing is stored
        column = column_tile * TILE + tl.arange(0, TILE)
        taken = (expert.to(tl.int64) * N + tl.minimum(column, N - 1)) * (PARTS * width)
        block_scales = weight_scales + (expert * column_tiles + column_tile) * T
        lane = tl.arange(0, TILE)
        total = tl.zeros([ROWS, TILE], tl.float32)
        for tile in range(0, T):
            inside = (tile % (T // PARTS)) * TILE + lane
            at = tile // (T // PARTS) * width + inside
            if EVEN:
                a = tl.load(x + read[:, None] * (PARTS * width) + at[None, :])
                b = tl.load(weight + taken[None, :] + at[:, None])
            else:
                a = tl.load(x + read[:, None] * (PARTS * width) + at[None, :], (inside < width)[None, :], 0.0)
                b = tl.load(weight + taken[None, :] + at[:, None], (inside < width)[:, None], 0.0)
            scale = tl.load(x_scales + tile * M + read) * tl.load(block_scales + tile)
            total += tl.dot(a, b) * scale[:, None]
        stored = (row < stop)[:, None] & (column < N)[None, :]
        tl.store(y + row.to(tl.int64)[:, None] * N + column[None, :], total.to(y.dtype.element_ty), stored)
