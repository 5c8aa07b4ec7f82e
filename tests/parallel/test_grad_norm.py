"""The norm and the clipping of gradients, against torch's own on one process."""

import pytest
import torch

from pipeline.parallel.grad_norm import clip_, local_gradients, local_squared_norm


@pytest.mark.parametrize("max_norm", [0.5, 1e6, 0.0])
def test_as_torch_clips(max_norm):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.zeros(shape, requires_grad=True) for shape in [(3, 4), (5,), (0, 4)]] for _ in range(2))
    for mine, other in zip(ours, theirs):
        mine.grad = torch.randn(mine.shape, generator=generator)
        other.grad = mine.grad.clone()
    gradients = local_gradients([*ours, torch.zeros(2, requires_grad=True)])  # one without a gradient
    norm = local_squared_norm(gradients, replicas=1).sqrt()
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm or float("inf"))
    clip_(gradients, norm, max_norm)
    torch.testing.assert_close(norm.float(), expected, rtol=1e-6, atol=0)
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=0)
