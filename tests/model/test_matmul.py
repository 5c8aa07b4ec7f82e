"""The CPU product against PyTorch's, above and below the size from which it is used."""

import pytest
import torch
from torch.nn import functional as F

from pipeline.model.matmul import SMALLEST, Linear, linear, product


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(3, 8, 5), (130, 96, 100), (0, 8, 5)])
def test_layer_and_gradients_equal_pytorch(rows, inputs, outputs):
    assert rows < 100 or rows * inputs * outputs > SMALLEST  # the second case is large enough for the fast product
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, rows, inputs, generator=generator, requires_grad=True)
    weight = torch.randn(outputs, inputs, generator=generator, requires_grad=True)
    upstream = torch.randn(2, rows, outputs, generator=generator)
    ours, theirs = linear(x, weight), F.linear(x, weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    grads = (torch.autograd.grad(y, (x, weight), upstream) for y in (ours, theirs))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_the_product_is_a_true_fp32_product():
    """Not a faster one in bf16 or tf32, whose errors would be a thousand times larger."""
    x, weight = (torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    exact = x.double() @ weight.double().T
    assert (product(x, weight) - exact).norm() / exact.norm() < 1e-6
    assert (product(x.T, weight.T) - x.double().T @ weight.double()).norm() / exact.norm() < 1e-6


def test_the_operator_passes_torchs_own_checks_and_other_dtypes_are_plain():
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.moonlight.linear, (x, weight))
    layer = Linear(8, 5).bfloat16()
    half = torch.randn(3, 8).bfloat16()
    assert torch.equal(layer(half), F.linear(half, layer.weight))
