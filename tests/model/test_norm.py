"""RMSNorm and its own backward against PyTorch's."""

import pytest
import torch
from torch.nn import functional as F

from pipeline.model.norm import RMSNorm


@pytest.mark.parametrize("shape", [(3, 5, 16), (7, 16), (0, 16)])
def test_norm_and_gradients_equal_pytorch(shape):
    norm = RMSNorm(16, 1e-5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=generator)
    x = torch.randn(shape, generator=generator).mul_(3).requires_grad_()
    upstream = torch.randn(shape, generator=generator)
    ours, theirs = norm(x), F.rms_norm(x, (16,), norm.weight, 1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    grads = (torch.autograd.grad(y, (x, norm.weight), upstream) for y in (ours, theirs))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_small_rows_are_ruled_by_eps():
    norm = RMSNorm(4, 1e-5)
    x = torch.full((1, 4), 1e-4)
    torch.testing.assert_close(norm(x), x / (1e-8 + 1e-5) ** 0.5)
