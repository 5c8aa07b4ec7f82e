"""Losses and gradients against torch's cross_entropy in fp64, by the plain function and by the kernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pipeline.kernels.cross_entropy import plain_cross_entropy
from pipeline.kernels.cross_entropy_triton import cross_entropy
from pipeline.model.loss import IGNORE


@pytest.mark.parametrize("function", [plain_cross_entropy, cross_entropy])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 6), vocabulary=st.sampled_from([1, 7, 96, 4096, 5000]), scale=st.sampled_from([1.0, 30.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_losses_and_gradients_are_torchs(function, tokens, vocabulary, scale, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(tokens, vocabulary, generator=generator)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[::3] = IGNORE
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none", ignore_index=IGNORE)
    expected.sum().backward()
    losses, grad = function(logits, labels, dtype)
    assert (losses.dtype, grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=scale * 1e-6)
    counted = labels >= 0
    near = (
        {"rtol": 1e-4 * max(1.0, scale / 100), "atol": 1e-7}
        if dtype == torch.float32
        else {"rtol": 2**-7, "atol": 1e-7}
    )
    torch.testing.assert_close(grad[counted].double(), exact.grad[counted], **near)


@pytest.mark.parametrize("function", [plain_cross_entropy, cross_entropy])
def test_a_token_that_is_almost_sure_keeps_its_small_gradient(function):
    logits = torch.tensor([[8.0, 0.0, -1.0]])
    exact = logits.double().requires_grad_()
    F.cross_entropy(exact, torch.tensor([0])).backward()
    grad = function(logits.clone(), torch.tensor([0]), torch.float32)[1]
    torch.testing.assert_close(grad.double(), exact.grad, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("function", [plain_cross_entropy, cross_entropy])
def test_a_logit_that_is_not_finite_shows(function):
    losses, _ = function(torch.tensor([[0.0, torch.nan], [0.0, torch.inf]]), torch.tensor([0, 0]), torch.float32)
    assert not losses.isfinite().any()
