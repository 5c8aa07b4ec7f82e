"""Grouped products against one linear layer per expert."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pipeline.model.grouped import grouped_linear


def offsets(counts):
    return torch.tensor(counts).cumsum(0).int()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_rows_meet_their_experts_forward_and_backward(counts, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), 8, generator=generator, requires_grad=True)
    weight = torch.randn(len(counts), 16, 8, generator=generator, requires_grad=True)
    upstream = torch.randn(sum(counts), 16, generator=generator)
    ours = grouped_linear(x, weight, offsets(counts))
    theirs = torch.cat([F.linear(rows, w) for rows, w in zip(x.split(counts), weight)])
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight), upstream),
        torch.autograd.grad(theirs, (x, weight), upstream, materialize_grads=True),
    ):
        torch.testing.assert_close(a, b)


def test_gradients_that_are_expanded_tensors():
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(2, 16, 8, requires_grad=True)
    grouped_linear(x, weight, offsets([2, 3])).sum().backward()
    torch.testing.assert_close(weight.grad[0], x[:2].sum(0).expand(16, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows_at_all(dtype):
    x = torch.empty(0, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(2, 16, 8).to(dtype).requires_grad_()
    out = grouped_linear(x, weight, offsets([0, 0]))
    out.backward(torch.empty(0, 16, dtype=dtype))
    assert (out.shape, out.dtype, x.grad.shape) == ((0, 16), dtype, (0, 8))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_are_inferred_without_data(dtype):
    """What torch.compile and the meta device rely on."""
    x = torch.empty(5, 8, dtype=dtype, device="meta", requires_grad=True)
    weight = torch.empty(2, 16, 8, dtype=dtype, device="meta", requires_grad=True)
    out = grouped_linear(x, weight, torch.empty(2, dtype=torch.int32, device="meta"))
    assert (out.shape, out.dtype) == ((5, 16), dtype)
    out.backward(torch.empty_like(out))
    assert (x.grad.shape, weight.grad.shape) == (x.shape, weight.shape)


def test_operators_pass_torchs_own_checks():
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(2, 16, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.moonlight.grouped_rows, (x, weight, offsets([2, 3]), True))
    torch.library.opcheck(torch.ops.moonlight.grouped_outer, (torch.randn(5, 16), x.detach(), offsets([5, 0])))


def test_why_the_operator_is_our_own():
    """torch's shape inference refuses fp32, which its CPU function multiplies: revisit grouped.py once this fails."""
    shapes = (torch.empty(8, 16), torch.empty(2, 16, 24))
    offsets = torch.tensor([3, 8], dtype=torch.int32)
    assert torch.nn.functional.grouped_mm(*shapes, offs=offsets).shape == (8, 24)
    meta = [tensor.to("meta") for tensor in shapes]
    with pytest.raises(RuntimeError, match="BF16"):
        torch.nn.functional.grouped_mm(*meta, offs=offsets.to("meta"))
