"""Grouped products against one linear layer per expert."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pipeline.model.grouped import grouped_linear, grouped_outer


def offsets(counts):
    return torch.tensor(counts).cumsum(0).int()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_rows_meet_their_experts_forward_and_backward(counts, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), 8, generator=generator, requires_grad=True)
    weight = torch.randn(len(counts), 16, 8, generator=generator, requires_grad=True)
    upstream = torch.randn(sum(counts), 16, generator=generator)
    theirs = torch.cat([F.linear(rows, w) for rows, w in zip(x.split(counts), weight)])
    grad_x, grad_weight = torch.autograd.grad(theirs, (x, weight), upstream, materialize_grads=True)
    for dtype in (torch.float32, torch.bfloat16):
        near = {"rtol": 2**-6, "atol": 0.1} if dtype == torch.bfloat16 else {}
        a, w, g = (t.detach().to(dtype) for t in (x, weight, upstream))
        for ours, expected in (
            (grouped_linear(a, w, offsets(counts)), theirs),
            (grouped_linear(g, w, offsets(counts), transpose=False), grad_x),
            (grouped_outer(g, a, offsets(counts)), grad_weight),
        ):
            torch.testing.assert_close(ours.float(), expected, **near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_are_expanded_tensors(dtype):
    x, weight = torch.randn(5, 8).to(dtype), torch.randn(2, 16, 8).to(dtype)
    ones = torch.ones((), dtype=dtype).expand(5, 16)
    sums = grouped_outer(ones, x, offsets([2, 3]))[0]
    torch.testing.assert_close(sums, x[:2].sum(0).expand(16, 8), rtol=0.02, atol=0.02)
    rows = grouped_linear(ones, weight, offsets([2, 3]), transpose=False)
    torch.testing.assert_close(rows[0], weight[0].sum(0), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows_at_all(dtype):
    x, weight = torch.empty(0, 8, dtype=dtype), torch.randn(2, 16, 8).to(dtype)
    out = grouped_linear(x, weight, offsets([0, 0]))
    assert (out.shape, out.dtype) == ((0, 16), dtype)
    assert torch.equal(grouped_outer(out, x, offsets([0, 0])), torch.zeros_like(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_are_inferred_without_data(dtype):
    """What a rehearsal and the meta device rely on."""
    x, weight = (torch.empty(*shape, dtype=dtype, device="meta") for shape in ((5, 8), (2, 16, 8)))
    ends = torch.empty(2, dtype=torch.int32, device="meta")
    out = grouped_linear(x, weight, ends)
    assert (out.shape, out.dtype) == ((5, 16), dtype)
    assert grouped_linear(out, weight, ends, transpose=False).shape == x.shape
    assert grouped_outer(out, x, ends).shape == weight.shape


def test_operators_pass_torchs_own_checks():
    x, weight = torch.randn(5, 8).bfloat16(), torch.randn(2, 16, 8).bfloat16()
    torch.library.opcheck(torch.ops.moonlight.grouped_rows, (x, weight, offsets([2, 3]), True))
    torch.library.opcheck(torch.ops.moonlight.grouped_outer, (torch.randn(5, 16).bfloat16(), x, offsets([5, 0])))


def test_why_the_operator_is_our_own():
    """torch's shape inference refuses fp32, which its CPU function multiplies: revisit grouped.py once this fails."""
    shapes = (torch.empty(8, 16), torch.empty(2, 16, 24))
    offsets = torch.tensor([3, 8], dtype=torch.int32)
    assert torch.nn.functional.grouped_mm(*shapes, offs=offsets).shape == (8, 24)
    meta = [tensor.to("meta") for tensor in shapes]
    with pytest.raises(RuntimeError, match="BF16"):
        torch.nn.functional.grouped_mm(*meta, offs=offsets.to("meta"))
