"""The counting sort of rows by bin and the sum of a row's copies, as operators; what they compute, and plainly: pipeline/parallel/rows.py.

Legend: R rows, C choices of each, M pairs, D width, N tokens, K choices of each, W ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("moonlight::place", mutates_args=(), device_types="cuda")
def place(bins_RC: Tensor, bins: int, pairs: int, slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(row_M, choice_M, place_M, bags_R1, counts); `slots` 0: none."""
    from pipeline.kernels.sorting_triton import place

    return place(bins_RC, bins, pairs, slots)


@place.register_fake
def _(bins_RC: Tensor, bins: int, pairs: int, slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sizes = (pairs, pairs, pairs, bins_RC.shape[0] + 1, bins)
    row_M, choice_M, place_M, bags_R1, counts = (bins_RC.new_empty(size) for size in sizes)
    return row_M, choice_M, place_M, bags_R1, counts


@torch.library.custom_op("moonlight::ranks_of", mutates_args=(), device_types="cuda")
def ranks_of(experts_NK: Tensor, experts_per_rank: int, ranks: int) -> Tensor:
    """[N, W]: each rank that holds an expert of the token, `ranks` in place of the others."""
    from pipeline.kernels.sorting_triton import ranks_of

    return ranks_of(experts_NK, experts_per_rank, ranks)


@ranks_of.register_fake
def _(experts_NK: Tensor, experts_per_rank: int, ranks: int) -> Tensor:
    return experts_NK.new_empty(experts_NK.shape[0], ranks)


@torch.library.custom_op("moonlight::copy_rows", mutates_args=(), device_types="cuda")
def copy_rows(x_RD: Tensor, row_M: Tensor, counts_B: Tensor | None, slots: int) -> Tensor:
    """PyTorch's own gather where all places are filled; of each `slots` places the first `counts_B` otherwise."""
    if counts_B is None:
        return x_RD.index_select(0, row_M)
    from pipeline.kernels.sorting_triton import copy_rows

    return copy_rows(x_RD, row_M, counts_B, slots)


@copy_rows.register_fake
def _(x_RD: Tensor, row_M: Tensor, counts_B: Tensor | None, slots: int) -> Tensor:
    return x_RD.new_empty(row_M.shape[0], x_RD.shape[1])


@torch.library.custom_op("moonlight::copy_rows_into", mutates_args=("into_MD",), device_types="cuda")
def copy_rows_into(into_MD: Tensor, x_RD: Tensor, row_M: Tensor, counts_B: Tensor, slots: int) -> None:
    """`copy_rows` to where the caller has room; what is not filled there stays as it is."""
    from pipeline.kernels.sorting_triton import copy_rows

    copy_rows(x_RD, row_M, counts_B, slots, into_MD)


@copy_rows_into.register_fake
def _(into_MD: Tensor, x_RD: Tensor, row_M: Tensor, counts_B: Tensor, slots: int) -> None:
    return None


@torch.library.custom_op("moonlight::bag_sums", mutates_args=(), device_types="cuda")
def bag_sums(rows_MD: Tensor, place_M: Tensor, bags_R1: Tensor) -> Tensor:
    """y_RD[r] = sum over j in [bags[r], bags[r + 1]) of rows_MD[place_M[j]], in fp32, rounded once."""
    from pipeline.kernels.sorting_triton import bag_sums

    return bag_sums(rows_MD, place_M, bags_R1)


@bag_sums.register_fake
def _(rows_MD: Tensor, place_M: Tensor, bags_R1: Tensor) -> Tensor:
    return rows_MD.new_empty(bags_R1.shape[0] - 1, rows_MD.shape[1])


@torch.library.custom_op("moonlight::bag_sums_into", mutates_args=("into_RD",), device_types="cuda")
def bag_sums_into(into_RD: Tensor, rows_MD: Tensor, place_M: Tensor, bags_R1: Tensor) -> None:
    """`bag_sums` to where the caller has room."""
    from pipeline.kernels.sorting_triton import bag_sums

    bag_sums(rows_MD, place_M, bags_R1, into_RD)


@bag_sums_into.register_fake
def _(into_RD: Tensor, rows_MD: Tensor, place_M: Tensor, bags_R1: Tensor) -> None:
    return None
