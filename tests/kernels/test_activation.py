"""SwiGLU by hand against autograd, and the kernels against it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pipeline.kernels import activation_triton
from pipeline.kernels.activation import plain_swiglu, plain_swiglu_backward, swiglu_backward


def drawn(rows, width, weighted, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    grad, gate, up = (2 * torch.randn(rows, width, generator=generator) for _ in range(3))
    weights = torch.rand(rows, generator=generator) if weighted else None
    return *(x.to(dtype) for x in (grad, gate, up)), weights


@pytest.mark.parametrize("weighted", [True, False])
def test_gradients_are_autograds(weighted):
    grad, gate, up, weights = drawn(5, 6, weighted, torch.float32, 0)
    inputs = [x.requires_grad_() for x in (gate, up, weights) if x is not None]
    expected = F.silu(gate) * up * (1 if weights is None else weights[:, None])
    torch.testing.assert_close(plain_swiglu(gate, up, weights), expected)
    both, hidden, grad_weights = plain_swiglu_backward(grad, gate, up, weights)
    torch.testing.assert_close(hidden, expected)
    found = [both[:, :6], both[:, 6:], grad_weights]
    for ours, theirs in zip(found, torch.autograd.grad(expected, inputs, grad)):
        torch.testing.assert_close(ours, theirs)


def test_weights_are_applied_in_fp32():
    _, gate, up, weights = drawn(8, 16, True, torch.bfloat16, 0)
    exact = F.silu(gate.float()) * up.float() * weights[:, None]
    assert torch.equal(plain_swiglu(gate, up, weights), exact.bfloat16())
    assert torch.equal(plain_swiglu_backward(up, gate, up, weights)[1], exact.bfloat16())


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 9), width=st.sampled_from([0, 1, 8, 511, 520]), weighted=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_kernels_compute_what_the_reference_does(rows, width, weighted, dtype, seed):
    grad, gate, up, weights = drawn(rows, width, weighted, dtype, seed)
    near = {"rtol": 2**-7, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(activation_triton.swiglu(gate, up, weights), plain_swiglu(gate, up, weights), **near)
    found = activation_triton.swiglu_backward(grad, gate, up, weights)
    for ours, theirs in zip(found, plain_swiglu_backward(grad, gate, up, weights), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **near | ({} if ours.dim() > 1 else {"rtol": 1e-4, "atol": 1e-4}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "end"), [(9, 0), (9, 1), (9, 8), (9, 9), (1, 0), (9, 20)])
def test_rows_behind_the_end_are_passed_over(rows, end, dtype):
    grad, gate, up, weights = drawn(rows, 40, True, dtype, 3)
    there = min(rows, end)
    for x in (grad, gate, up, weights):  # the memory of a buffer holds anything
        x[there:] = torch.nan
    near = {"rtol": 2**-7, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    end_1 = torch.tensor([end], dtype=torch.int32)
    hidden = activation_triton.swiglu(gate, up, weights, end_1)
    expected = plain_swiglu(gate[:there], up[:there], weights[:there])
    torch.testing.assert_close(hidden[:there], expected, **near)
    found = activation_triton.swiglu_backward(grad, gate, up, weights, end_1)
    plain = swiglu_backward(grad, gate, up, weights, end_1)
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours[:there], theirs[:there], **near)
    assert not found[2][there:].any()
    assert not plain[2][there:].any()
