"""Experts whose rows are multiplied in fp8, against the same in the compute dtype and against products of what the numbers stand for."""

from typing import Any

import pytest
import torch

from pipeline.kernels import grouped_fp8_triton, quantise_triton
from pipeline.kernels.quantise import rows_in_fp32, stack_in_fp32
from pipeline.model import row_products
from pipeline.model.experts import Experts, MoE
from pipeline.model.row_products import Fp8Copies, kept
from pipeline.parallel.dispatch import Choices
from tests.bits import same_bits
from tests.model.oracle import small_config


def drawn(dtype=torch.float32, **sizes):
    """(experts, rows, choices): experts 0 to 6 of 8 get rows."""
    draw = torch.Generator().manual_seed(0)
    experts = Experts(small_config(**sizes))
    for stack in experts.parameters():
        stack.data = (0.1 * torch.randn(stack.shape, generator=draw)).to(dtype)
    x = torch.randn(20, experts.gate_proj.shape[2], generator=draw).to(dtype)
    chosen = torch.rand(20, 7, generator=draw).topk(3, dim=1).indices
    return experts, x.requires_grad_(), Choices(chosen, torch.rand(20, 3, generator=draw).requires_grad_(), 60, True)


def passed(experts: Experts, x: torch.Tensor, choices: Choices) -> list[Any]:
    """[result, gradients of rows, of what choices weigh, of the three stacks]"""
    y = experts(x, choices)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y, *torch.autograd.grad(y, (x, choices.weights_RC, *experts.parameters()), upstream)]


def off(ours, theirs):
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


WIDE = {"hidden_size": 136, "moe_intermediate_size": 264}  # one tile and a little, two and a little


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [{}, WIDE])
def test_near_the_compute_dtype(dtype, sizes):
    """Products are off by 4 per cent, and what follows from several of them by as many times."""
    experts, x, choices = drawn(dtype, **sizes)
    expected = passed(experts, x, choices)
    experts.fp8 = Fp8Copies()
    found = passed(experts, x, choices)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert 1e-3 < off(ours, theirs) < 0.12
    unused = found[3:]
    assert not any(stack[7].any() for stack in unused)


def test_forward_and_the_gradients_of_rows_are_those_of_what_the_numbers_stand_for(monkeypatch):
    experts, x, choices = drawn(**WIDE)
    experts.fp8 = Fp8Copies()
    found = passed(experts, x, choices)

    def wide(rows, stack, offsets_e, dtype, parts=1):
        weight = stack_in_fp32(stack, parts).double()
        out = [
            part @ weight[e].T
            for e, part in enumerate(rows_in_fp32(rows, parts).double().tensor_split(offsets_e[:-1].tolist()))
        ]
        return torch.cat(out).to(dtype)

    monkeypatch.setattr(row_products, "grouped_fp8", wide)
    for ours, theirs in zip(found, passed(experts, x, choices), strict=True):
        assert off(ours, theirs) < 1e-3  # a number that rounds the other way next time is off by 2^-4


def test_gradients_of_weights_are_not_in_fp8(monkeypatch):
    """Given the same rows and gradients they are those of the compute dtype, to the bit: here with products that round nothing."""
    experts, x, choices = drawn(torch.bfloat16, **WIDE)
    expected = passed(experts, x, choices)
    monkeypatch.setattr(
        row_products.Fp8, "gate_up", lambda self, x: row_products.Wide(self.stacks, self.places).gate_up(x)
    )
    for name in ("down", "through_down", "through_gate_up"):
        plain = getattr(row_products.Wide, name)
        monkeypatch.setattr(
            row_products.Fp8, name, lambda self, x, plain=plain: plain(row_products.Wide(self.stacks, self.places), x)
        )
    experts.fp8 = Fp8Copies()
    for ours, theirs in zip(passed(experts, x, choices), expected, strict=True):
        assert same_bits(ours, theirs)


def test_a_row_that_is_not_finite_shows():
    experts, x, choices = drawn()
    experts.fp8 = Fp8Copies()
    with torch.no_grad():
        x[3, 5] = torch.inf
    y, grad_x, *_ = passed(experts, x, choices)
    assert y[3].isnan().all()
    assert grad_x[3].isnan().all()
    others = torch.arange(20) != 3
    assert y[others].isfinite().all()


def test_no_rows_at_all():
    experts, _, _ = drawn()
    experts.fp8 = Fp8Copies()
    rows = torch.zeros(0, experts.gate_proj.shape[2], requires_grad=True)
    y, grad_x, _, *stacks = passed(
        experts, rows, Choices(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3, requires_grad=True), 0, True)
    )
    assert y.shape == grad_x.shape == rows.shape
    assert not any(each.any() for each in stacks)


def test_copies_are_made_once_while_they_are_kept(monkeypatch):
    experts, x, choices = drawn()
    experts.fp8 = copies = Fp8Copies()
    made = []
    quantised = row_products.quantised_stacks

    def counted(stacks, *, transposed):
        made.append(transposed)
        return quantised(stacks, transposed=transposed)

    monkeypatch.setattr(row_products, "quantised_stacks", counted)
    alone = passed(experts, x, choices)
    assert (made.count(False), made.count(True)) == (3, 2)
    made.clear()
    with kept([copies]):
        for _ in range(3):
            assert all(map(same_bits, passed(experts, x, choices), alone))
    assert (made.count(False), made.count(True)) == (3, 2)
    with torch.no_grad():
        experts.gate_proj.mul_(2)
    assert not same_bits(passed(experts, x, choices)[0], alone[0])  # nothing old is left


def test_kernels_do_the_same(monkeypatch):
    """The whole way of a GPU in Triton's interpreter: of rows in a buffer of fixed size, too."""
    experts, x, choices = drawn()
    experts.fp8 = Fp8Copies()
    expected = passed(experts, x, choices)
    filled = []

    def rows(x, row_M=None, counts_B=None, slots=0, parts=1):
        filled.append(counts_B is not None)
        return row_products.Quantised(*quantise_triton.quantised_rows(x, row_M, counts_B, slots, parts))

    def product(rows, stack, offsets_e, dtype, parts=1):
        return grouped_fp8_triton.grouped_fp8(*rows, *stack, offsets_e, parts, dtype)

    monkeypatch.setattr(row_products, "quantised_rows", rows)
    monkeypatch.setattr(row_products, "grouped_fp8", product)
    monkeypatch.setattr(
        row_products, "quantised_stacks",
        lambda stacks, *, transposed: row_products.Quantised(*quantise_triton.quantised_stacks(stacks, transposed)),
    )  # fmt: skip
    for bounded in (False, True):
        found = passed(experts, x, choices._replace(bounded=bounded, pairs=60))
        for ours, theirs in zip(found, expected, strict=True):
            assert off(ours, theirs) < 1e-3
    assert set(filled) == {False, True}


def test_a_whole_layer():
    """Routing, shared experts and the network's own backward around it."""
    layer, draw = MoE(small_config(), 0.0), torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=draw)
    x = torch.randn(2, 9, small_config().hidden_size, generator=draw)
    wide = layer(x).x_BSD
    layer.experts.fp8 = Fp8Copies()
    narrow = layer(x).x_BSD
    assert 0 < off(narrow, wide) < 0.1
    narrow.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
