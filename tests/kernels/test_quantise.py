"""Tiles of e4m3 against torch's own cast and exact arithmetic, and the kernels against them to the bit."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.kernels import quantise_triton
from pipeline.kernels.quantise import (
    E4M3,
    TILE,
    Quantised,
    plain_rows,
    plain_stacks,
    rows_in_fp32,
    stack_in_fp32,
    tiles_of,
)
from tests.bits import same_bits


def drawn(*shape, seed=0, dtype=torch.float32, spread=4.0):
    """Numbers of very different sizes."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=draw) * torch.exp(spread * torch.randn(*shape, generator=draw))).to(dtype)


def by_hand(tile):
    """(e4m3, scale) of one tile, by the definition."""
    largest = tile.abs().max().double()
    scale = 2.0**-108
    while largest > 448 * scale:
        scale *= 2
    return (tile.double() / scale).float().to(E4M3), scale


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 4),
    width=st.sampled_from([8, 120, 128, 136, 264]),
    parts=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_rows_are_what_the_definition_says(rows, width, parts, seed):
    x = drawn(rows, parts * width, seed=seed)
    found = plain_rows(x, parts)
    assert found.values.shape == x.shape
    assert found.scales.shape == (tiles_of(parts * width, parts), rows)
    for m in range(rows):
        tiles = [tile for part in x[m].chunk(parts) for tile in part.split(TILE)]
        values, scales = zip(*(by_hand(tile) for tile in tiles))
        assert same_bits(found.values[m], torch.cat([each.view(torch.uint8) for each in values]).view(E4M3))
        assert found.scales[:, m].tolist() == list(scales)


@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_of_stacks_are_what_the_definition_says(transposed):
    stacks = [drawn(2, 136, 264, seed=seed) for seed in range(2)]
    found = plain_stacks(stacks, transposed=transposed)
    turned = [stack.transpose(1, 2) for stack in stacks] if transposed else stacks
    assert found.values.shape == torch.cat(turned, dim=2).shape
    for e in range(2):
        parts = [[block for rows in stack[e].split(TILE) for block in rows.split(TILE, dim=1)] for stack in turned]
        for part, blocks in enumerate(parts):
            width, tiles = turned[0].shape[2], -(-turned[0].shape[2] // TILE)
            for number, block in enumerate(blocks):
                b, t = divmod(number, tiles)
                values, scale = by_hand(block)
                row, column = b * TILE, part * width + t * TILE
                mine = found.values[e, row : row + block.shape[0], column : column + block.shape[1]]
                assert same_bits(mine, values)
                assert float(found.scales[e, b, part * tiles + t]) == scale


def test_the_other_way_round_are_the_same_numbers():
    """So forward and the gradients of rows multiply the same weights."""
    stack = drawn(3, 200, 136)
    forward, backward = (plain_stacks([stack], transposed=turned) for turned in (False, True))
    assert torch.equal(stack_in_fp32(forward), stack_in_fp32(backward).transpose(1, 2))


def test_how_far_a_number_is_off():
    """A half of the last of four bits, or of e4m3's smallest number, whose tile's largest is above 224 of it."""
    x = drawn(50, 1000)
    off = (rows_in_fp32(plain_rows(x)) - x).abs()
    largest = torch.nn.functional.pad(x, (0, 24)).view(50, -1, TILE).abs().amax(2).repeat_interleave(TILE, 1)[:, :1000]
    assert (off <= torch.maximum(x.abs() * 2**-4, largest / 224 * 2**-10)).all()
    assert (off > x.abs() * 2**-5).any()


def test_outliers_cost_their_tile_alone():
    """Where one scale for all would leave nothing of the small numbers."""
    x = drawn(64, 512, spread=0.5)
    x[::8, ::100] *= 1e6
    one_scale = 2.0 ** torch.ceil(torch.log2(x.abs().max() / 448))
    whole = (x / one_scale).to(E4M3).float() * one_scale
    plain = torch.ones_like(x, dtype=torch.bool)  # tiles without one
    for row in range(0, 64, 8):
        for column in range(0, 512, 100):
            plain[row, column // TILE * TILE : (column // TILE + 1) * TILE] = False

    def off(found):
        return float((found - x)[plain].norm() / x[plain].norm())

    assert off(rows_in_fp32(plain_rows(x))) < 0.03
    assert off(whole) > 0.9


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(poison):
    x = drawn(3, 256)
    x[1, 130] = poison
    rows = rows_in_fp32(plain_rows(x))
    assert rows[1, 128:].isnan().all()
    assert rows[[0, 2]].isfinite().all()
    assert rows[1, :128].isfinite().all()
    stack = drawn(2, 256, 256)
    stack[1, 5, 200] = poison
    found = stack_in_fp32(plain_stacks([stack], transposed=False))
    assert found[1, :128, 128:].isnan().all()
    assert int(found.isnan().sum()) == 128 * 128


def test_tiles_of_zeros_and_of_tiny_numbers():
    x = torch.zeros(2, 256)
    x[0, :128] = 1e-38
    x[1, :128] = 2.0**-100
    found = plain_rows(x)
    assert torch.equal(rows_in_fp32(found)[1], x[1])
    assert not found.values.float()[:, 128:].any()
    assert float(found.scales.min()) == 2.0**-108


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 9), width=st.sampled_from([0, 8, 120, 128, 136]), parts=st.integers(1, 2), gathers=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 99),
)  # fmt: skip
@example(rows=3, width=1408, parts=2, gathers=False, dtype=torch.bfloat16, seed=0)
def test_the_kernel_of_rows_gives_the_same_bits(rows, width, parts, gathers, dtype, seed):
    x = drawn(rows, parts * width, seed=seed, dtype=dtype)
    if rows > 4 and width:
        x[1, 0], x[2, -1], x[3] = torch.nan, -torch.inf, 0
        x[4] *= 1e-38
    row_M = (
        torch.randint(0, rows, (2 * rows,), generator=torch.Generator().manual_seed(seed)) if gathers and rows else None
    )
    found = Quantised(*quantise_triton.quantised_rows(x, row_M, None, 0, parts))
    expected = plain_rows(x if row_M is None else x[row_M], parts)
    assert same_bits(found.values, expected.values)
    assert same_bits(found.scales, expected.scales)


@pytest.mark.parametrize(("counts", "slots"), [([0], 9), ([1], 9), ([9], 9), ([20], 9), ([2, 0, 3], 3), ([0, 5, 1], 3)])
def test_rows_that_are_not_filled_are_passed_over(counts, slots):
    x = drawn(len(counts) * slots, 136)
    there = torch.arange(len(x)) % slots < torch.tensor(counts)[torch.arange(len(x)) // slots]
    x[~there] = torch.nan  # the memory of a buffer holds anything
    values, scales = quantise_triton.quantised_rows(x, None, torch.tensor(counts, dtype=torch.int32), slots, 1)
    expected = plain_rows(x)
    assert same_bits(values[there], expected.values[there])
    assert same_bits(scales[:, there], expected.scales[:, there])


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    experts=st.integers(1, 3), sizes=st.tuples(*[st.sampled_from([8, 128, 136, 264])] * 2), stacks=st.integers(1, 2),
    transposed=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_kernel_of_blocks_gives_the_same_bits(experts, sizes, stacks, transposed, dtype, seed):
    given = [drawn(experts, *sizes, seed=seed + number, dtype=dtype) for number in range(stacks)]
    if experts > 1:
        given[0][1, 3, 4], given[-1][0, :, :8] = torch.nan, 0
    found = Quantised(*quantise_triton.quantised_stacks(given, transposed))
    expected = plain_stacks(given, transposed=transposed)
    assert same_bits(found.values, expected.values)
    assert same_bits(found.scales, expected.scales)


def test_no_experts_and_no_width():
    for shape in ((0, 16, 16), (2, 0, 16), (2, 16, 0)):
        empty = torch.empty(shape)
        found = quantise_triton.quantised_stacks([empty], False)
        expected = plain_stacks([empty], transposed=False)
        assert [each.shape for each in found] == [each.shape for each in expected]
