"""Newton-Schulz against torch's own implementation (bitwise, or within 2^-7) and against its polynomial in fp64."""

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz as torch_newton_schulz

from pipeline.optim import newton_schulz
from pipeline.optim.newton_schulz import coefficients, orthogonalize

SHAPES = [(4, 24, 40), (4, 40, 24), (3, 32, 32), (2, 1, 9), (3, 257, 64), (1, 176, 256)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batches_equal_torch_matrix_by_matrix(shape, dtype):
    x_BMN = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = orthogonalize(x_BMN, coefficients("moonlight", 5))
    for x_MN, o_MN in zip(x_BMN, found):
        assert torch.equal(o_MN, torch_newton_schulz(x_MN, (3.4445, -4.7750, 2.0315), 5, 1e-7))


@pytest.mark.parametrize("side", [4, 8, 15, 16, 17, 20])
@pytest.mark.parametrize("backend", ["plain", "gram"])
def test_half_bits_do_not_depend_on_how_many_small_experts_a_rank_has(side, backend):
    """Where torch has two kernels for 16-bit products, it is the whole batch's size that picks one."""
    x_BMN = torch.randn(720, side, side + 2, generator=torch.Generator().manual_seed(6))
    schedule = coefficients("moonlight", 5)
    alone = torch.cat([orthogonalize(x_MN[None], schedule, backend) for x_MN in x_BMN])
    for experts in (2, 3, 720):
        assert torch.equal(torch.cat([orthogonalize(x, schedule, backend) for x in x_BMN.split(experts)]), alone), (
            experts
        )


def exact(x_MN: torch.Tensor) -> torch.Tensor:
    """The same iteration in fp64, from the matrix as bf16 and its bf16 norm on."""
    x_MN = (x_MN.bfloat16() / x_MN.bfloat16().norm().clamp(min=1e-7)).double()
    x_SL = x_MN.T if x_MN.size(0) > x_MN.size(1) else x_MN
    for a, b, c in coefficients("moonlight", 5):
        gram_SS = x_SL @ x_SL.T
        x_SL = a * x_SL + (b * gram_SS + c * gram_SS @ gram_SS) @ x_SL
    return x_SL.T if x_MN.size(0) > x_MN.size(1) else x_SL


@pytest.mark.parametrize("products", ["half", "fp32"])
@pytest.mark.parametrize(
    "shape", [(50, 3, 20), (30, 8, 12), (20, 24, 40), (20, 48, 20), (3, 64, 256), (1, 256, 176)], ids=str
)
def test_close_to_torch_and_not_further_from_exact_arithmetic(shape, products):
    x_BMN = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    found = orthogonalize(x_BMN, coefficients("moonlight", 5), products=products)
    theirs = torch.stack([torch_newton_schulz(x_MN, (3.4445, -4.7750, 2.0315), 5, 1e-7) for x_MN in x_BMN])
    truth = torch.stack([exact(x_MN) for x_MN in x_BMN])
    assert (found.float() - theirs.float()).abs().max() <= 2**-7
    ours, torchs = ((o.double() - truth).flatten(1).norm(dim=1) for o in (found, theirs))
    assert ours.norm() <= torchs.norm()
    if min(shape[1:]) >= 64:  # matrices as training has them: each
        assert (ours <= torchs).all()


@pytest.mark.parametrize("backend", ["plain", "gram"])
@pytest.mark.parametrize("shape", [(5, 33, 57), (5, 57, 33), (5, 176, 256)], ids=str)
def test_fp32_bits_are_a_function_of_the_matrix(shape, backend):
    """Not of the batch around it, its place in memory, its strides or the number of threads."""
    x_BMN = torch.randn(shape, generator=torch.Generator().manual_seed(5)).bfloat16()

    def run(x: torch.Tensor) -> torch.Tensor:
        return orthogonalize(x, coefficients("moonlight", 5), backend, "fp32")

    expected = run(x_BMN)
    assert torch.equal(torch.stack([run(x_MN[None])[0] for x_MN in x_BMN]), expected)
    assert torch.equal(run(x_BMN.mT.contiguous().mT), expected)
    shifted = torch.empty(x_BMN.numel() + 3, dtype=torch.bfloat16)[3:].view(shape).copy_(x_BMN)
    assert torch.equal(run(shifted), expected)
    threads = torch.get_num_threads()
    try:
        for several in (1, 2, 3, 8):
            torch.set_num_threads(several)
            assert torch.equal(run(x_BMN), expected), several
            assert torch.equal(run(x_BMN[:1]), expected[:1]), several
            assert torch.get_num_threads() == several
    finally:
        torch.set_num_threads(threads)


def test_large_batches_are_cut_into_tiles(monkeypatch):
    x_BMN = torch.randn(7, 24, 20, generator=torch.Generator().manual_seed(0))
    expected = orthogonalize(x_BMN, coefficients("moonlight", 5))
    for tile in (1, 960, 1439, 3360):
        monkeypatch.setattr(newton_schulz, "CPU_TILE", tile)
        assert torch.equal(orthogonalize(x_BMN, coefficients("moonlight", 5)), expected)


def polynomial(x_MN: torch.Tensor, name: str, steps: int) -> torch.Tensor:
    """The same map in fp64: U p(S) V^T with p the composition of the odd polynomials."""
    x_MN = x_MN.double() / x_MN.bfloat16().float().norm().bfloat16().double()
    u, s, v = torch.linalg.svd(x_MN, full_matrices=False)
    for a, b, c in coefficients(name, steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("products", ["half", "fp32"])
@pytest.mark.parametrize("backend", ["plain", "gram"])
@pytest.mark.parametrize("name", ["moonlight", "polar_express"])
@pytest.mark.parametrize("shape", [(96, 24), (24, 96), (48, 48)], ids=str)
def test_every_evaluation_is_the_polynomial_of_the_singular_values(shape, name, backend, products):
    x_MN = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = orthogonalize(x_MN[None], coefficients(name, 5), backend, products)[0].double()
    expected = polynomial(x_MN, name, 5)
    assert (found - expected).norm() / expected.norm() < 0.03  # bf16 (plain) or fp16 (gram) arithmetic


def test_polar_express_orthogonalises():
    x_MN = torch.randn(24, 96, generator=torch.Generator().manual_seed(2))
    for backend in ("plain", "gram"):
        singular = torch.linalg.svdvals(orthogonalize(x_MN[None], coefficients("polar_express", 6), backend)[0].float())
        assert (singular - 1).abs().max() < 0.03


def test_coefficients_beyond_the_table():
    steps = coefficients("polar_express", 8)
    assert len(steps) == 8
    assert steps[5:] == ((1.875, -1.25, 0.375),) * 3
    assert coefficients("moonlight", 2) == ((3.4445, -4.7750, 2.0315),) * 2


@pytest.mark.parametrize("products", ["half", "fp32"])
@pytest.mark.parametrize("backend", ["plain", "gram"])
def test_zero_stays_zero_and_nan_stays_in_its_matrix(backend, products):
    x_BMN = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(3))
    x_BMN[0] = 0.0
    x_BMN[2, 0, 0] = float("nan")
    found = orthogonalize(x_BMN, coefficients("moonlight", 5), backend, products)
    assert torch.equal(found[0], torch.zeros(8, 12, dtype=torch.bfloat16))
    assert torch.isfinite(found[1]).all()
    assert torch.isnan(found[2]).all()
