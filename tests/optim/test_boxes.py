"""Boxes against `torch.chunk` applied axis by axis, the rule of DTensor and FSDP2."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.optim.boxes import Layout, block_boxes, chunk, intersect, numel


@settings(max_examples=200, deadline=None, derandomize=True)
@given(n=st.integers(0, 40), parts=st.integers(1, 12))
def test_chunks_are_those_of_torch(n, parts):
    pieces = torch.arange(n).chunk(parts) if n else ()
    for index in range(parts):
        start, stop = chunk(n, parts, index)
        expected = pieces[index].tolist() if index < len(pieces) else []
        assert list(range(start, stop)) == expected


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 5)),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3)),
    dims=st.tuples(st.sampled_from([None, 0, 1]), st.sampled_from([None, 0, 1, 2]), st.sampled_from([None, 0])),
    order=st.permutations([0, 1, 2]),
)
def test_boxes_are_nested_chunks(shape, sizes, dims, order):
    layout = Layout(shape, tuple(zip("abc", sizes)), dims, tuple(order))
    numbers = torch.arange(numel(tuple((0, n) for n in shape))).view(shape)
    for coordinates in itertools.product(*map(range, sizes)):
        assert layout.coordinates(layout.rank(coordinates)) == coordinates
        expected = numbers
        for axis in order:
            if dims[axis] is not None:
                pieces = expected.chunk(sizes[axis], dims[axis]) if expected.shape[dims[axis]] else ()
                index = coordinates[axis]
                expected = pieces[index] if index < len(pieces) else expected.narrow(dims[axis], 0, 0)
        found = numbers[tuple(slice(a, b) for a, b in layout.box(coordinates))]
        assert found.shape == expected.shape
        assert torch.equal(found, expected)


def test_blocks_of_a_stack_and_of_heads():
    assert list(block_boxes((2, 3, 4), None)) == [((0, 1), (0, 3), (0, 4)), ((1, 2), (0, 3), (0, 4))]
    assert list(block_boxes((6, 4), 3)) == [((0, 3), (0, 4)), ((3, 6), (0, 4))]


def test_intersection():
    assert intersect(((0, 4), (2, 6)), ((3, 9), (0, 3))) == ((3, 4), (2, 3))
    assert intersect(((0, 4), (2, 6)), ((4, 9), (0, 3))) is None
