"""The CPU product against PyTorch's, above and below the size from which it is used."""

import pytest
import torch
from torch.nn import functional as F

from pipeline.model import matmul
from pipeline.model.matmul import SMALLEST, Linear, linear, outer, product


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"], autouse=True)
def onednn(request, monkeypatch):
    """Each test as on an AMD processor and as on any other."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: request.param)
    return request.param


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(3, 8, 5), (130, 96, 100), (333, 96, 100), (0, 8, 5)])
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
    x, weight = (torch.randn(512, 512, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    exact = x.double() @ weight.double().T
    assert (product(x, weight) - exact).norm() / exact.norm() < 1e-6
    assert (product(x.T, weight.T) - x.double().T @ weight.double()).norm() / exact.norm() < 1e-6


def test_any_number_of_rows_makes_few_shapes(monkeypatch, onednn):
    """oneDNN keeps a kernel for every shape: growing prompts and experts' loads must not make new ones for ever."""
    shapes = set()
    real = torch.ops.mkldnn._linear_pointwise

    def spy(x, weight, *rest):
        shapes.add((tuple(x.shape), tuple(weight.shape)))
        return real(x, weight, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", spy)
    weight = torch.randn(100, 128)  # a width that is a tile's size, too
    for rows in (*range(0, 700, 23), 4096, 5000):
        x, grad = torch.randn(rows, 128), torch.randn(rows, 100)
        torch.testing.assert_close(product(x, weight), x @ weight.T, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(outer(grad, x), grad.T @ x, rtol=1e-4, atol=1e-3)
    tiles = (128, 512, 4096) if onednn else ()
    assert shapes == {((m, 128), (100, 128)) for m in tiles} | {((100, m), (128, m)) for m in tiles}


@pytest.mark.parametrize("part", [slice(None, 160), slice(160, None)])
def test_the_second_factor_has_no_gaps(monkeypatch, part):
    """Halves of a wider matrix, as gradients of gate and up are: oneDNN's fast kernels take none as the second factor."""
    real = torch.ops.mkldnn._linear_pointwise

    def spy(x, weight, *rest):
        assert weight.is_contiguous() or weight.T.is_contiguous()
        return real(x, weight, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", spy)
    generator = torch.Generator().manual_seed(0)
    wide, x, narrow = (torch.randn(512, width, generator=generator) for width in (320, 96, 64))
    half = wide[:, part]
    near = {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(outer(half, x), half.T @ x, **near)  # the half is the wider one: the second factor
    torch.testing.assert_close(outer(half, torch.cat([wide, x], 1)), half.T @ torch.cat([wide, x], 1), **near)
    torch.testing.assert_close(product(narrow.T.contiguous().T, wide[:128, :64]), narrow @ wide[:128, :64].T, **near)
    torch.testing.assert_close(product(x, wide[:256, :96]), x @ wide[:256, :96].T, **near)


def test_only_amd_processors_take_onednn(monkeypatch):
    monkeypatch.undo()  # the fixture
    for name, expected in (("AMD EPYC 9355", True), ("Intel(R) Xeon(R) 6975P-C", False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {"cpu_name": name})
        matmul.onednn_is_faster.cache_clear()
        assert matmul.onednn_is_faster() is (expected and torch.backends.mkldnn.is_available())
    matmul.onednn_is_faster.cache_clear()


def test_the_operator_passes_torchs_own_checks_and_other_dtypes_are_plain():
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.moonlight.linear, (x, weight))
    layer = Linear(8, 5).bfloat16()
    half = torch.randn(3, 8).bfloat16()
    assert torch.equal(layer(half), F.linear(half, layer.weight))
