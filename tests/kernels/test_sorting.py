"""The kernels of the counting sort against the plain one, place by place."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.kernels import sorting_triton
from pipeline.parallel.dispatch import ranks_plainly
from pipeline.parallel.rows import place_plainly, sum_plainly
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
    for name, ours, theirs in zip(expected._fields, found, expected, strict=True):
        assert torch.equal(ours, theirs), name


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
    exact = torch.zeros(min(rows, 65), width, dtype=torch.float64).index_add(0, placing.row_M, rows_MD.double())
    torch.testing.assert_close(found, exact.to(dtype), rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-6)
    if width:
        torch.testing.assert_close(found, sum_plainly(rows_MD, placing.place_M, placing.bags_R1))
