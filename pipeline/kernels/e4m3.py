"""What the plain functions of quantise.py and its kernels have in common: the format, the size of tiles, and the shapes of what comes out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
TILE = 128
INFINITE = 0x7F800000  # bits of fp32: infinity; NaN is above
LEAST = 27 << 23  # of 2^-100: no tile counts as smaller, so that a scale is a normal number
BELOW_448 = 0x1FFFFF  # what a mantissa of 448 = 1.75 * 2^8 lacks to the next power of two, less one


def tiles_of(width: int, parts: int = 1) -> int:
    """How many tiles a row of `width` numbers in `parts` has."""
    return parts * -(-(width // parts) // TILE)


def room_for_stacks(stacks: Sequence[Tensor], transposed: bool) -> tuple[Tensor, Tensor]:
    """(values, scales) that hold nothing yet."""
    e, O, I = stacks[0].shape  # noqa: E741
    N, K = (I, O) if transposed else (O, I)
    parts = len(stacks)
    scales = stacks[0].new_empty(e, tiles_of(N), tiles_of(parts * K, parts), dtype=torch.float32)
    return stacks[0].new_empty(e, N, parts * K, dtype=E4M3), scales
