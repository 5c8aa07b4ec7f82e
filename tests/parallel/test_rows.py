"""The counting sort against a stable argsort, and its two gathers against their own definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.parallel.rows import copy_rows, place, sum_rows


def drawn_bins(rows: int, bins: int, choices: int, share: float, seed: int) -> torch.Tensor:
    """Distinct bins for each row, some of them none."""
    generator = torch.Generator().manual_seed(seed)
    bins_RC = torch.rand(rows, bins, generator=generator).argsort(1)[:, :choices]
    return bins_RC.masked_fill(torch.rand(rows, choices, generator=generator) < share, bins)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 9), bins=st.integers(1, 7), choices=st.integers(1, 7), share=st.sampled_from([0.0, 0.4, 1.0]),
    room=st.integers(0, 5), seed=st.integers(0, 99),
)  # fmt: skip
def test_places_are_those_of_a_stable_sort(rows, bins, choices, share, room, seed):
    bins_RC = drawn_bins(rows, bins, min(choices, bins), share, seed)
    C = bins_RC.shape[1]
    flat = bins_RC.flatten()
    pairs = int((flat < bins).sum())
    expected = flat.argsort(stable=True)[:pairs]
    placing = place(bins_RC, bins, pairs + room, all_chosen=share == 0.0 and room == 0)
    assert placing.choice_M.shape == placing.place_M.shape == (pairs + room,)
    first = placing.first(pairs)
    assert torch.equal(first.choice_M, expected)
    assert torch.equal(first.row_M, expected // C)
    assert placing.counts.tolist() == [int((flat == b).sum()) for b in range(bins)]
    inverse = {int(choice): m for m, choice in enumerate(expected)}
    assert first.place_M.tolist() == [inverse[choice] for choice in range(rows * C) if choice in inverse]
    assert placing.bags_R1.tolist() == [0, *(bins_RC < bins).sum(1).cumsum(0).tolist()]


def test_pairs_beyond_a_bound_are_left_out():
    placing = place(torch.tensor([[0, 1], [1, 0], [0, 2]]), 2, 3, all_chosen=False)
    assert placing.row_M.tolist() == [0, 1, 2]
    assert placing.counts.tolist() == [3, 2]
    assert placing.bags_R1.tolist() == [0, 1, 2, 3]


def test_bins_with_places_of_their_own():
    placing = place(torch.tensor([[0, 1], [2, 1], [0, 1]]), 2, 4, all_chosen=False, slots=2)
    assert placing.row_M.tolist() == [0, 2, 0, 1]  # the third row of bin 1 has no room
    assert placing.counts.tolist() == [2, 3]
    assert placing.place_M.tolist() == [0, 2, 3, 1]
    assert placing.bags_R1.tolist() == [0, 2, 3, 4]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_copies_and_sums_are_each_others_gradients(share):
    bins_RC = drawn_bins(5, 4, 3, share, 0)
    pairs = int((bins_RC < 4).sum())
    placing = place(bins_RC, 4, pairs, all_chosen=share == 0.0)
    x_RD = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    rows_MD = torch.randn(pairs, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(copy_rows(x_RD, placing), x_RD[placing.row_M])
    expected = torch.zeros(5, 4, dtype=torch.float64).index_add(0, placing.row_M, rows_MD)
    torch.testing.assert_close(sum_rows(rows_MD, placing), expected)
    if pairs:
        assert torch.autograd.gradcheck(lambda x: copy_rows(x, placing), x_RD)
        assert torch.autograd.gradcheck(lambda rows: sum_rows(rows, placing), rows_MD)


def test_sums_of_bf16_are_rounded_once():
    bins_RC = drawn_bins(64, 8, 6, 0.0, 0)
    placing = place(bins_RC, 8, 64 * 6, all_chosen=True)
    rows_MD = torch.randn(64 * 6, 32).bfloat16()
    exact = torch.zeros(64, 32, dtype=torch.float64).index_add(0, placing.row_M, rows_MD.double())
    torch.testing.assert_close(sum_rows(rows_MD, placing).double(), exact, rtol=2**-8, atol=1e-6)
