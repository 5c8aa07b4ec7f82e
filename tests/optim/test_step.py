"""The optimizer in one process: bitwise against torch's, no-op steps, state in and out, figures."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.config.schema import AdamWConfig, MuonConfig, OptimizerConfig
from pipeline.optim.muon import build_optimizer
from pipeline.optim.rules import Rule
from tests.optim.oracle import Oracle

RULES = [Rule("norm", "adamw"), Rule("*", "muon")]
SHAPES = {"tall": (48, 20), "wide": (20, 48), "twin": (48, 20), "stack": (4, 12, 20), "norm": (20,)}


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [(name, nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in SHAPES.items()]


def set_gradients(named, seed):
    generator = torch.Generator().manual_seed(seed)
    for _, p in named:
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("products", ["auto", "fp32"])
@pytest.mark.parametrize("bucket_bytes", [1, 2**27])
def test_equal_to_torch(bucket_bytes, products):
    named, config = parameters(), OptimizerConfig(muon=MuonConfig(bucket_bytes=bucket_bytes, products=products))
    oracle, optimizer = Oracle(named, config, RULES, 0.02), build_optimizer(named, config, RULES)
    for step in range(5):
        set_gradients(named, step + 1)
        oracle.step({name: p.grad for name, p in named})
        optimizer.step(0.02, torch.tensor(1.0) if step % 2 else None)
        oracle.check(named, f"step {step}")


def test_adamw_for_everything_equals_torch():
    named, config = parameters(), OptimizerConfig(name="adamw", weight_decay=0.05, adamw=AdamWConfig())
    oracle = Oracle(named, config, [Rule("*", "adamw")], 0.02)
    optimizer = build_optimizer(named, config, [Rule("*", "adamw")])
    for step in range(5):
        set_gradients(named, step + 1)
        oracle.step({name: p.grad for name, p in named})
        optimizer.step(0.02, torch.tensor(1.0) if step % 2 else None)
        oracle.check(named, f"step {step}")
    assert optimizer.state_dict()["tall.step"].item() == 5


def test_weight_decay_uses_the_plain_rate_and_updates_the_scaled_one():
    named = [("w", nn.Parameter(torch.ones(8, 18)))]
    optimizer = build_optimizer(named, OptimizerConfig(weight_decay=0.5), [Rule("*", "muon")])
    named[0][1].grad = torch.zeros(8, 18)
    optimizer.step(0.1)
    assert torch.equal(named[0][1].detach(), torch.full((8, 18), 1 - 0.1 * 0.5))
    set_gradients(named, 3)
    optimizer.step(0.1, measure=True)
    rms = optimizer.stats()["update_rms"]["w"]  # 0.2 * sqrt(18) * o: about 0.2 whatever the shape
    moved = (0.95 - named[0][1].detach() - 0.95 * 0.05) / 0.1
    assert rms == pytest.approx(moved.square().mean().sqrt().item(), rel=1e-4)
    assert 0.13 < rms < 0.24


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_rejected_step_changes_no_bit(poison):
    named = parameters()
    named[0][1].data[0, 0] = -0.0
    optimizer = build_optimizer(named, OptimizerConfig(), RULES)
    set_gradients(named, 1)
    optimizer.step(0.02)
    tensors = [*optimizer.state_dict().values(), *(p.detach() for _, p in named)]
    before = [t.clone() for t in tensors]
    set_gradients(named, 2)
    for _, p in named:
        p.grad.view(-1)[::3] = poison
    optimizer.step(0.02, torch.tensor(0.0))
    assert all(torch.equal(t.view(torch.int32), b.view(torch.int32)) for t, b in zip(tensors, before))
    set_gradients(named, 2)
    optimizer.step(0.02, torch.tensor(1.0))
    continued = [t.clone() for t in tensors]
    for t, b in zip(tensors, before):
        t.copy_(b)
    set_gradients(named, 2)
    optimizer.step(0.02)
    assert all(torch.equal(t, c) for t, c in zip(tensors, continued))  # ok = 1 is the plain step


def test_the_verdict_stays_on_the_device():
    """A 0/1 tensor without data (meta device) works: nothing in a step may look at its value."""
    named = [(name, nn.Parameter(p.detach().to("meta"))) for name, p in parameters() if name != "norm"]
    for _, p in named:
        p.grad = torch.empty_like(p)
    build_optimizer(named, OptimizerConfig(), [Rule("*", "muon")]).step(0.02, torch.ones((), device="meta"))


def test_state_is_complete_before_the_first_step():
    state = build_optimizer(parameters(), OptimizerConfig(), RULES).state_dict()
    muon = {f"{name}.momentum_buffer" for name in SHAPES if name != "norm"}
    assert set(state) == muon | {"norm.exp_avg", "norm.exp_avg_sq", "norm.step"}
    assert all(not t.any() for t in state.values())


def test_state_moves_between_optimizers():
    one, other = parameters(), parameters()
    source = build_optimizer(one, OptimizerConfig(), RULES)
    set_gradients(one, 1)
    source.step(0.02)
    target = build_optimizer(other, OptimizerConfig(), RULES)
    target.load_state_dict({name: tensor.clone() for name, tensor in source.state_dict().items()})
    assert all(torch.equal(t, source.state_dict()[name]) for name, t in target.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("norm.step"), r"'norm.step': found nothing, expected \(\)"),
        (lambda s: s.update(extra=torch.zeros(2)), r"'extra': found \(2,\), expected nothing"),
        (lambda s: s.update({"wide.momentum_buffer": torch.zeros(3, 3)}), r"found \(3, 3\), expected \(20, 48\)"),
    ],
)
def test_state_that_does_not_fit_is_named(change, message):
    optimizer = build_optimizer(parameters(), OptimizerConfig(), RULES)
    state = optimizer.state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)


def test_frozen_parameters_are_left_alone():
    named = parameters()
    named[0][1].requires_grad_(False)
    optimizer = build_optimizer(named, OptimizerConfig(), RULES)
    assert "tall.momentum_buffer" not in optimizer.state_dict()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 2**31), st.floats(-30, 30)), min_size=1, max_size=60),
    st.sampled_from([0.5, 0.9, 0.95]),
)
def test_bf16_momentum_is_within_its_bound(steps, momentum):
    """Whatever the gradients and their sizes: 2^-8 / (1 - mu) of the largest that an element's momentum has been."""
    kept = {}
    for dtype in ("fp32", "bf16"):
        kept[dtype] = [("w", nn.Parameter(torch.zeros(4, 6)))]
    optimizers = {
        dtype: build_optimizer(
            named, OptimizerConfig(muon=MuonConfig(momentum=momentum, momentum_dtype=dtype)), [Rule("*", "muon")]
        )
        for dtype, named in kept.items()
    }
    largest = torch.zeros(4, 6, dtype=torch.float64)
    for seed, exponent in steps:
        gradient = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
        for dtype, optimizer in optimizers.items():
            kept[dtype][0][1].grad = gradient.clone()
            optimizer.step(0.02)
        exact, rounded = (optimizers[dtype].state_dict()["w.momentum_buffer"].double() for dtype in ("fp32", "bf16"))
        largest = torch.maximum(largest, torch.maximum(exact.abs(), rounded.abs()))
        assert ((exact - rounded).abs() <= largest * 2**-8 / (1 - momentum) * 1.001).all()
    assert optimizers["bf16"].state_dict()["w.momentum_buffer"].dtype == torch.bfloat16
