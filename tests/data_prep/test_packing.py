"""Packing, by its properties: every token once and in order, no row too long, ties the same every time."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import packing
from data_prep.packing import Packer, Row

LENGTHS = st.lists(st.lists(st.integers(0, 100), max_size=40), max_size=5)  # windows of documents; 0: left out


def pack(windows: list[list[int]], length: int, method: str, max_documents: int | None = None) -> list[Row]:
    packer = Packer(length, method, max_documents)
    rows, first = [], 0
    for window in windows:
        rows += packer.add(first, window)
        first += len(window)
    return rows + packer.finish()


@settings(derandomize=True, max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 40), st.sampled_from(["best_fit", "concat", "pad"]), st.integers(1, 6))
def test_every_token_once(windows: list[list[int]], length: int, method: str, max_documents: int) -> None:
    rows = pack(windows, length, method, max_documents)
    tokens = Counter()
    for row in rows:
        assert 0 < row.used == sum(piece.length for piece in row.pieces) <= length
        assert len(row.pieces) <= (1 if method == "pad" else max_documents)
        for piece in row.pieces:
            assert piece.length > 0
            tokens.update((piece.document, token) for token in range(piece.start, piece.start + piece.length))
    documents = enumerate(length for window in windows for length in window)
    assert tokens == Counter((document, token) for document, size in documents for token in range(size))


@settings(derandomize=True, max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 40), st.sampled_from(["best_fit", "concat"]), st.sampled_from([1, 3, 1 << 20]))
def test_a_document_that_goes_on_ends_its_row(
    windows: list[list[int]], length: int, method: str, rows_open: int
) -> None:
    """Or another document would follow its last token there without an EOS between them."""
    sizes = [size for window in windows for size in window]
    with mock.patch.object(packing, "OPEN_TOKENS", rows_open * length):
        rows = pack(windows, length, method)
    for row in rows:
        goes_on = [piece.start + piece.length < sizes[piece.document] for piece in row.pieces]
        assert not any(goes_on[:-1])
        assert row.used == length or not goes_on[-1]


@settings(derandomize=True, max_examples=200, deadline=None)
@given(LENGTHS, st.sampled_from([1, 3, 1 << 20]), st.integers(1, 6))
def test_whole_documents_are_never_cut(windows: list[list[int]], rows_open: int, max_documents: int) -> None:
    """Whatever is padding then; no document is longer than a row."""
    with mock.patch.object(packing, "OPEN_TOKENS", rows_open * 100):
        rows = pack(windows, 100, "whole", max_documents)
    pieces = sorted(piece for row in rows for piece in row.pieces)
    documents = enumerate(length for window in windows for length in window)
    assert pieces == [(document, 0, length) for document, length in documents if length]
    assert all(row.used <= 100 and len(row.pieces) <= max_documents for row in rows)


def padding(rows: list[Row], length: int) -> int:
    return sum(length - row.used for row in rows)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 200), st.sampled_from([1, 3, 1 << 20]))
def test_best_fit_wastes_a_128th_and_a_row(windows: list[list[int]], length: int, rows_open: int) -> None:
    """Whatever the lengths, however few rows may stay open between windows."""
    with mock.patch.object(packing, "OPEN_TOKENS", rows_open * length):
        rows = pack(windows, length, "best_fit")
    assert padding(rows, length) <= len(rows) * length / packing.SHARE + length


@settings(derandomize=True, max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 40))
def test_best_fit_cuts_only_where_whole_documents_would_waste_more(windows: list[list[int]], length: int) -> None:
    sizes = [size for window in windows for size in window]
    rows = pack(windows, length, "best_fit")
    cut = []
    for row in rows:
        for piece in row.pieces:
            whole = sizes[piece.document] - sizes[piece.document] % length
            if (piece.start, piece.length) != (whole, sizes[piece.document] % length) and (
                piece.length != length or piece.start % length
            ):
                cut.append(piece)
    with mock.patch.object(Packer, "_fill", return_value=None):
        uncut = pack(windows, length, "best_fit")
    if cut:
        assert padding(uncut, length) > len(uncut) * length / packing.SHARE
    else:
        assert uncut == rows


@pytest.mark.parametrize(
    ("mean", "length"),
    [*itertools.product([2, 10, 64, 300, 1000, 9000], [512]), *itertools.product([10, 30, 64, 5000], [8192])],
)
def test_less_than_two_per_cent_padding_at_any_mean_length(mean: int, length: int) -> None:
    rng = random.Random(mean)
    documents = 250 * length // mean // 5
    windows = [[max(2, int(rng.expovariate(1 / mean))) for _ in range(documents)] for _ in range(5)]
    rows = pack(windows, length, "best_fit")
    assert padding(rows, length) < 0.02 * len(rows) * length


def test_documents_that_do_not_fit_side_by_side_are_cut() -> None:
    """All of them three fifths of a row: whole, two fifths of the slots would be padding."""
    rows = pack([[600] * 500] * 4, 1000, "best_fit")
    assert 1200 <= len(rows) <= 1210  # a slot in 128 may be padding


@settings(derandomize=True, max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 40))
def test_concat_leaves_room_only_in_the_last_row(windows: list[list[int]], length: int) -> None:
    rows = pack(windows, length, "concat")
    assert [row.used for row in rows[:-1]] == [length] * (len(rows) - 1)
    flat = [
        (piece.document, token)
        for row in rows
        for piece in row.pieces
        for token in range(piece.start, piece.start + piece.length)
    ]
    assert flat == sorted(flat)


def test_best_fit_by_hand() -> None:
    """Longest first into the fullest row that fits: 7 | 6+4 | 5+5 | 3 joins the 7."""
    rows = pack([[5, 3, 6, 7, 4, 5]], 10, "best_fit")
    assert sorted(sorted(piece.length for piece in row.pieces) for row in rows) == [[3, 7], [4, 6], [5, 5]]


def test_rows_stay_open_over_windows() -> None:
    """Small documents of a later window fill the room an earlier one left: no padding at all."""
    rows = pack([[60] * 10, [40] * 10], 100, "best_fit")
    assert [row.used for row in rows] == [100] * 10


def test_little_padding_on_web_like_lengths() -> None:
    """Log-normal lengths (median 490 tokens), rows of 4,096: best-fit pads less than 0.5 %."""
    import numpy as np

    sizes = np.exp(np.random.default_rng(0).normal(np.log(490), 1.1, 20_000)).astype(int) + 1
    rows = pack([sizes[start : start + 4000].tolist() for start in range(0, 20_000, 4000)], 4096, "best_fit")
    assert 1 - sizes.sum() / (len(rows) * 4096) < 0.005


@pytest.mark.parametrize("method", ["best_fit", "concat", "pad"])
def test_open_documents_are_those_of_later_rows(method: str) -> None:
    packer = Packer(10, method, 8)
    packer.add(0, [4, 7, 13])
    later = packer.add(3, [3, 6]) + packer.finish()
    needed = {piece.document for row in later for piece in row.pieces if piece.document < 3}
    packer = Packer(10, method, 8)
    packer.add(0, [4, 7, 13])
    assert packer.open_documents == needed
