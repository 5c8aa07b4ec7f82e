"""The kernels of the counting sort against the plain one, place by place."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.kernels import sorting_triton
from pipeline.parallel.dispatch import ranks_plainly
from pipeline.parallel.rows import Filled, Placing, place_plainly, sum_plainly
from tests.parallel.test_rows import drawn_bins

ROWS = st.sampled_from([0, 1, 5, 63, 64, 65, 200])  # a program takes 64


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=ROWS, bins=st.integers(1, 9), choices=st.integers(1, 7), share=st.sampled_from([0.0, 0.4, 1.0]),
    room=st.integers(-4, 5), slots=st.sampled_from([None, 1, 3, 40]), seed=st.integers(0, 99),
)  # fmt: skip
def test_places_are_those_of_the_reference(rows, bins, choices, share, room, slots, seed):
    bins_RC = drawn_bins(rows, bins, min(choices, bins), share, seed)
    pairs = max(0, int((bins_RC < bins).sum()) + room) if slots is None else bins * slots
    found = sorting_triton.place(bins_RC, bins, pairs, slots or 0)
    expected = place_plainly(bins_RC, bins, pairs, all_chosen=False, slots=slots)
    for name, ours, theirs in zip(Placing._fields[:5], found, expected[:5], strict=True):
        assert torch.equal(ours, theirs), name


def places_filled(filled, places):
    at = torch.arange(places)
    return at % filled.slots < filled.counts_B.repeat_interleave(filled.slots)[:places]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    bins=st.integers(1, 5), slots=st.sampled_from([1, 3, 4, 40]), rows=st.integers(1, 9), width=st.sampled_from([0, 1, 8, 1030]),
    share=st.sampled_from([0.0, 0.3, 1.5]), dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_rows_are_copied_to_the_places_that_are_filled(bins, slots, rows, width, share, dtype, seed):
    """A bin that more rows named than it has places for is full."""
    generator = torch.Generator().manual_seed(seed)
    filled = Filled((torch.rand(bins, generator=generator) * share * slots).ceil().long(), slots)
    x_RD = torch.randn(rows, width, generator=generator).to(dtype)
    row_M = torch.randint(rows, (bins * slots,), generator=generator)
    there_M = places_filled(filled, bins * slots)
    out_of_range_M = row_M.where(there_M, 10**12)  # what is not filled is not read
    found = sorting_triton.copy_rows(x_RD, out_of_range_M, *filled)
    assert found.dtype == dtype
    assert torch.equal(found[there_M], x_RD[row_M][there_M])
    room_MD = torch.full_like(found, 7.0)
    assert sorting_triton.copy_rows(x_RD, out_of_range_M, *filled, room_MD) is room_MD
    assert torch.equal(room_MD, x_RD[row_M].where(there_M[:, None], 7.0))


def test_places_say_which_of_them_are_filled():
    bins_RC = drawn_bins(40, 5, 3, 0.6, 7)
    placing = place_plainly(bins_RC, 5, 5 * 9, all_chosen=False, slots=9)
    filled_M = places_filled(placing.filled, 45)
    assert 0 < filled_M.sum() < 45
    assert placing.counts.max() > 9
    assert torch.equal(placing.place_M.sort().values[-int(filled_M.sum()) :], torch.arange(45)[filled_M])
    assert place_plainly(bins_RC, 5, 120, all_chosen=False).filled is None


@settings(max_examples=10, deadline=None, derandomize=True)
@given(rows=ROWS, ranks=st.sampled_from([1, 2, 4, 8]), per_rank=st.integers(1, 4), share=st.sampled_from([0.0, 0.5]))
def test_ranks_are_those_of_the_reference(rows, ranks, per_rank, share):
    experts = ranks * per_rank
    experts_NK = drawn_bins(rows, experts, min(3, experts), share, 1)
    assert torch.equal(sorting_triton.ranks_of(experts_NK, per_rank, ranks), ranks_plainly(experts_NK, per_rank, ranks))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    rows=ROWS, width=st.sampled_from([0, 1, 8, 2049]), share=st.sampled_from([0.0, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_sums_are_those_of_the_reference(rows, width, share, dtype):
    bins_RC = drawn_bins(min(rows, 65), 4, 3, share, 2)
    pairs = int((bins_RC < 4).sum())
    placing = place_plainly(bins_RC, 4, pairs, all_chosen=False)
    rows_MD = torch.randn(pairs, width).to(dtype)
    found = sorting_triton.bag_sums(rows_MD, placing.place_M, placing.bags_R1)
    room_RD = torch.empty_like(found)
    assert sorting_triton.bag_sums(rows_MD, placing.place_M, placing.bags_R1, room_RD) is room_RD
    assert torch.equal(room_RD, found)
    exact = torch.zeros(min(rows, 65), width, dtype=torch.float64).index_add(0, placing.row_M, rows_MD.double())
    torch.testing.assert_close(found, exact.to(dtype), rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-6)
    if width:
        torch.testing.assert_close(found, sum_plainly(rows_MD, placing.place_M, placing.bags_R1))
