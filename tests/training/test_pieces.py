"""A box of a tensor from its pieces, front to back: torch's own slicing says what it must be."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.training.commits import DamagedCheckpoint
from pipeline.training.pieces import Piece, PieceReader, runs_of_box


@st.composite
def tensor_cut_up(draw: st.DrawFn) -> tuple[list[int], list[tuple[list[int], list[int]]], list[int], list[int]]:
    """A shape of up to three dims, the boxes it is cut into by a grid, and the offsets and sizes of one box of it."""
    shape = draw(st.lists(st.integers(1, 6), min_size=0, max_size=3))
    edges = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape]
    pieces = [
        ([start for start, _ in cell], [stop - start for start, stop in cell])
        for cell in product(*(list(zip(each, each[1:])) for each in edges))
    ]
    offsets = [draw(st.integers(0, size - 1)) for size in shape]
    sizes = [draw(st.integers(1, size - offset)) for size, offset in zip(shape, offsets)]
    return shape, draw(st.permutations(pieces)), offsets, sizes


def box_of(tensor: torch.Tensor, offsets: list[int], sizes: list[int]) -> torch.Tensor:
    for dim, (offset, size) in enumerate(zip(offsets, sizes)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor.flatten()


@given(tensor_cut_up())
@settings(max_examples=300, derandomize=True, deadline=None)
def test_runs_are_the_box_in_order(made: Any) -> None:
    shape, pieces, offsets, sizes = made
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    stored = [box_of(tensor, *piece) for piece in pieces]
    found, ends = [], [0] * len(pieces)
    for run in runs_of_box(offsets, sizes, pieces):
        assert run.place == sum(map(len, found))
        assert run.start >= ends[run.piece]  # a piece is read from front to back
        ends[run.piece] = run.start + run.count
        found.append(stored[run.piece][run.start : run.start + run.count])
    assert torch.equal(torch.cat(found), box_of(tensor, offsets, sizes))


def test_rows_of_one_piece_are_one_run() -> None:
    """Else a stack of experts would be read expert by expert."""
    pieces = [([0, 0, 0], [4, 3, 2]), ([4, 0, 0], [4, 3, 2])]
    runs = list(runs_of_box([2, 0, 0], [4, 3, 2], pieces))
    assert [(run.piece, run.start, run.count) for run in runs] == [(0, 12, 12), (1, 0, 12)]


def piece_of(data: bytes, block: int) -> Piece:
    """`block` 0: as format 2 had it."""
    if not block:
        return Piece("file", 3, len(data), xxhash.xxh3_128_hexdigest(data))
    blocks = [data[start : start + block] for start in range(0, len(data), block)]
    return Piece("file", 3, len(data), xxhash.xxh3_128_hexdigest(b"".join(map(xxhash.xxh3_128_digest, blocks))), block)


def reader_of(data: bytes, piece: Piece) -> PieceReader:
    file = b"abc" + data

    def read(start: int, into: memoryview) -> int:
        part = file[start : start + min(len(into), 7)]  # less than was asked for, as a file may give
        into[: len(part)] = part
        return len(part)

    return PieceReader(piece, read, "here")


@pytest.mark.parametrize("block", [0, 16, 1000])
def test_what_is_passed_over_is_checked_too(block: int) -> None:
    data = bytes(range(100))
    piece = piece_of(data, block)
    reader = reader_of(data, piece)
    assert b"".join(bytes(part) for part in reader.parts(20, 30)) == data[20:30]
    assert b"".join(bytes(part) for part in reader.parts(30, 31)) == data[30:31]  # of the same block
    assert b"".join(bytes(part) for part in reader.parts(47, 99)) == data[47:99]
    reader.finish()
    whole = memoryview(bytearray(100))
    reader_of(data, piece).into(whole)
    assert whole == data
    for flipped in (5, 30, 99):
        damaged = bytearray(data)
        damaged[flipped] ^= 1
        reader = reader_of(bytes(damaged), piece)
        list(reader.parts(20, 60))
        with pytest.raises(DamagedCheckpoint, match=r"here: bytes 3 to 103 have xxh3"):
            reader.finish()
    with pytest.raises(DamagedCheckpoint, match="here: the file ends at byte 102 inside of it, 1 bytes are missing"):
        reader_of(data[:-1], piece).finish()
