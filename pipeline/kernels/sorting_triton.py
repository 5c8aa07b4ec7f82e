"""The kernels of the counting sort: count, then place, then list each row's places.

A program takes ROWS rows against all bins. Counts of programs, bin by bin, are summed up to each in between (PyTorch's
cumsum over bins x programs numbers); nothing is atomic, so places are those of a stable sort.

Rows are copied by programs of ROWS_COPIED places, which end at once if none of theirs is filled.

Legend: R rows, C choices of each, B bins, P programs, M pairs, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64  # of a program
ROWS_COPIED = 4


def place(bins_RC: Tensor, bins: int, pairs: int, slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(row_M, choice_M, place_M, bags_R1, counts) as pipeline/parallel/rows.py has them; `slots` 0: none."""
    bins_RC = bins_RC.contiguous()
    (R, C), device = bins_RC.shape, bins_RC.device
    row_M, choice_M, place_M = torch.zeros(3, pairs, dtype=torch.int64, device=device)
    bags_R1 = torch.zeros(R + 1, dtype=torch.int64, device=device)
    if R * C == 0 or bins == 0:
        return row_M, choice_M, place_M, bags_R1, torch.zeros(bins, dtype=torch.int64, device=device)
    programs, padded = triton.cdiv(R, ROWS), triton.next_power_of_2(bins)
    counts_BP = torch.empty(bins, programs, dtype=torch.int32, device=device)
    _count[(programs,)](bins_RC, counts_BP, R, bins, programs, C, padded, ROWS)
    before_BP = counts_BP.view(-1).cumsum(0, dtype=torch.int32).view(bins, programs) - counts_BP
    counts = counts_BP.sum(1)
    place_RC = torch.empty(R, C, dtype=torch.int64, device=device)
    placed_P = torch.empty(programs, dtype=torch.int64, device=device)
    _place[(programs,)](
        bins_RC, before_BP, place_RC, placed_P, row_M, choice_M, R, bins, programs, pairs, slots, C, padded, ROWS
    )
    _list[(programs,)](place_RC, placed_P.cumsum(0) - placed_P, place_M, bags_R1, R, C, ROWS)
    return row_M, choice_M, place_M, bags_R1, counts


def ranks_of(experts_NK: Tensor, experts_per_rank: int, ranks: int) -> Tensor:
    experts_NK = experts_NK.contiguous()
    N, K = experts_NK.shape
    met_NW = torch.empty(N, ranks, dtype=torch.int64, device=experts_NK.device)
    if N:
        padded = triton.next_power_of_2(ranks)
        _ranks[(triton.cdiv(N, ROWS),)](experts_NK, met_NW, N, experts_per_rank, ranks, K, padded, ROWS)
    return met_NW


def copy_rows(x_RD: Tensor, row_M: Tensor, counts_B: Tensor, slots: int, into_MD: Tensor | None = None) -> Tensor:
    """x_RD[row_M] in the first counts_B of each `slots` places; the others hold anything, or what `into_MD` held."""
    x_RD = x_RD.contiguous()
    M, D = row_M.shape[0], x_RD.shape[1]
    rows_MD = x_RD.new_empty(M, D) if into_MD is None else into_MD
    assert rows_MD.is_contiguous()
    assert rows_MD.shape == (M, D), (rows_MD.shape, M, D)
    if rows_MD.numel():
        columns = min(triton.next_power_of_2(D), 1024)
        grid = (triton.cdiv(M, ROWS_COPIED), triton.cdiv(D, columns))
        _copy[grid](x_RD, row_M, counts_B, rows_MD, M, D, slots, ROWS_COPIED, columns)
    return rows_MD


def bag_sums(rows_MD: Tensor, place_M: Tensor, bags_R1: Tensor, into_RD: Tensor | None = None) -> Tensor:
    rows_MD = rows_MD.contiguous()
    R, D = bags_R1.shape[0] - 1, rows_MD.shape[1]
    y_RD = rows_MD.new_empty(R, D) if into_RD is None else into_RD
    assert y_RD.is_contiguous()
    assert y_RD.shape == (R, D), (y_RD.shape, R, D)
    if y_RD.numel():
        columns = min(triton.next_power_of_2(D), 2048)
        _sums[(R, triton.cdiv(D, columns))](rows_MD, place_M, bags_R1, y_RD, D, columns)
    return y_RD


@triton.jit
def _named(bins, row, bin_, R, C: tl.constexpr, ROWS: tl.constexpr, BINS: tl.constexpr):
    """[ROWS, BINS]: one where the row names the bin."""
    named = tl.zeros([ROWS, BINS], tl.int32)
    for c in tl.static_range(C):
        chosen = tl.load(bins + row * C + c, row < R, -1)
        named += (chosen[:, None] == bin_[None, :]).to(tl.int32)
    return named


@triton.jit
def _count(bins, counts, R, B, P, C: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr):
    program = tl.program_id(0)
    row, bin_ = program * ROWS + tl.arange(0, ROWS), tl.arange(0, BINS)
    named = _named(bins, row, bin_, R, C, ROWS, BINS)
    tl.store(counts + bin_ * P + program, tl.sum(named, 0), bin_ < B)


@triton.jit
def _place(
    bins, before, places, placed, rows, choices, R, B, P, pairs, slots,
    C: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row, bin_ = program * ROWS + tl.arange(0, ROWS), tl.arange(0, BINS)
    named = _named(bins, row, bin_, R, C, ROWS, BINS)
    first = tl.load(before + bin_ * P, bin_ < B, 0)  # place of the bin's first pair
    mine = tl.load(before + bin_ * P + program, bin_ < B, 0)  # of its first one here
    upto = tl.cumsum(named, 0) - named + mine[None, :]
    total = tl.zeros([ROWS], tl.int64)
    for c in tl.static_range(C):
        chosen = tl.load(bins + row * C + c, row < R, -1)
        here = (chosen[:, None] == bin_[None, :]) & (bin_ < B)[None, :]
        at = tl.sum(tl.where(here, upto, 0), 1)
        ok = (row < R) & (chosen >= 0) & (chosen < B)
        if slots > 0:
            inside = at - tl.sum(tl.where(here, first[None, :], 0), 1)
            ok = ok & (inside < slots)
            at = inside + (chosen * slots).to(tl.int32)
        else:
            ok = ok & (at < pairs)
        tl.store(places + row * C + c, tl.where(ok, at, -1).to(tl.int64), row < R)
        tl.store(rows + at, row.to(tl.int64), ok)
        tl.store(choices + at, (row * C + c).to(tl.int64), ok)
        total += ok.to(tl.int64)
    tl.store(placed + program, tl.sum(total, 0))


@triton.jit
def _list(places, before, listed, bags, R, C: tl.constexpr, ROWS: tl.constexpr):
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.int64)
    for c in tl.static_range(C):
        total += (tl.load(places + row * C + c, row < R, -1) >= 0).to(tl.int64)
    upto = tl.cumsum(total, 0) + tl.load(before + program)
    tl.store(bags + row + 1, upto, row < R)
    at = upto - total
    for c in tl.static_range(C):
        place = tl.load(places + row * C + c, row < R, -1)
        tl.store(listed + at, place, place >= 0)
        at += (place >= 0).to(tl.int64)


@triton.jit
def _ranks(experts, met, N, per_rank, W, K: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr):
    row, rank = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, RANKS)
    named = tl.zeros([ROWS, RANKS], tl.int32)
    for k in tl.static_range(K):
        expert = tl.load(experts + row * K + k, row < N, -1)
        named += ((expert // per_rank)[:, None] == rank[None, :]).to(tl.int32)
    out = tl.where(named > 0, rank[None, :], W).to(tl.int64)
    tl.store(met + row[:, None] * W + rank[None, :], out, (row < N)[:, None] & (rank < W)[None, :])


@triton.jit
def _copy(x, rows, counts, copies, M, D, slots, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    filled = (place < M) & (place % slots < tl.load(counts + place // slots, place < M, 0))
    if tl.sum(filled.to(tl.int32), 0) > 0:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = filled[:, None] & (column < D)[None, :]
        row = tl.load(rows + place, filled, 0)
        values = tl.load(x + row[:, None] * D + column[None, :], inside)
        tl.store(copies + place.to(tl.int64)[:, None] * D + column[None, :], values, inside)


@triton.jit
def _sums(rows, places, bags, sums, D, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for j in range(tl.load(bags + row), tl.load(bags + row + 1)):
        total += tl.load(rows + tl.load(places + j) * D + column, column < D, 0.0).to(tl.float32)
    tl.store(sums + row * D + column, total.to(sums.dtype.element_ty), column < D)
