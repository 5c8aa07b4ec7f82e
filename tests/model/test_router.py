"""Routing against transformers' router and the formulas of the papers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from pipeline.model.hf import hf_config
from pipeline.model.router import Router, update_router_bias
from tests.model.oracle import random_model, small_config


def router_of(config, seed=0, aux_loss_weight=0.0):
    router = Router(config, aux_loss_weight)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        router.weight.normal_(0.0, 0.5, generator=generator)
        router.e_score_correction_bias.uniform_(-0.5, 0.5, generator=generator)
    return router


def dense(routing, experts):
    """Weights as a matrix [N, E]; the order of the chosen does not matter."""
    return torch.zeros(routing.experts_NK.shape[0], experts).scatter(1, routing.experts_NK, routing.weights_NK)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    experts=st.integers(2, 16),
    share=st.floats(0.01, 1.0),
    normalise=st.booleans(),
    factor=st.sampled_from([1.0, 2.446]),
)
def test_chosen_experts_and_weights_are_transformers(experts, share, normalise, factor):
    config = small_config(
        n_routed_experts=experts,
        num_experts_per_tok=max(1, int(share * experts)),
        norm_topk_prob=normalise,
        routed_scaling_factor=factor,
    )
    router = router_of(config)
    oracle = DeepseekV3TopkRouter(DeepseekV3Config.from_dict(hf_config(config, bos_token_id=None, eos_token_id=1)))
    oracle.load_state_dict(router.state_dict())
    x_BSD = torch.randn(2, 5, config.hidden_size, generator=torch.Generator().manual_seed(1))
    routing = router(x_BSD)
    _, weights_NK, experts_NK = oracle(x_BSD)
    expected = torch.zeros(10, experts).scatter(1, experts_NK, weights_NK)
    torch.testing.assert_close(dense(routing, experts), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(routing.tokens_per_expert_E, (expected > 0).sum(0))


def test_bias_moves_the_choice_and_not_the_weights():
    config = small_config()
    router = router_of(config)
    router.e_score_correction_bias.zero_()
    x_BSD = torch.randn(1, 30, config.hidden_size, generator=torch.Generator().manual_seed(1))
    router.e_score_correction_bias[5] = 10.0  # everybody takes expert 5 now
    routing = router(x_BSD)
    assert routing.tokens_per_expert_E[5] == 30
    scores_NE = (x_BSD[0] @ router.weight.T).sigmoid()
    chosen_NK = scores_NE.gather(1, routing.experts_NK)
    expected_NK = 2.446 * chosen_NK / chosen_NK.sum(1, keepdim=True)
    torch.testing.assert_close(routing.weights_NK, expected_NK)
    routing.weights_NK.square().sum().backward()
    assert router.weight.grad.norm() > 0
    assert not router.e_score_correction_bias.requires_grad


def test_balance_loss_is_the_formula_of_the_paper():
    """DeepSeek-V3, equations 17-20, written out per sequence and expert."""
    config, alpha = small_config(), 0.01
    router = router_of(config, aux_loss_weight=alpha)
    B, S, E, K = 3, 7, config.n_routed_experts, config.num_experts_per_tok
    x_BSD = torch.randn(B, S, config.hidden_size, generator=torch.Generator().manual_seed(2), requires_grad=True)
    routing = router(x_BSD)
    scores_BSE = (x_BSD @ router.weight.T).sigmoid()
    experts_BSK = routing.experts_NK.view(B, S, K)
    expected = 0.0
    for b in range(B):
        for e in range(E):
            f = E / (K * S) * sum(int(e in experts_BSK[b, t]) for t in range(S))
            p = sum(scores_BSE[b, t, e] / scores_BSE[b, t].sum() for t in range(S)) / S
            expected = expected + alpha * f * p / B
    assert routing.aux_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (ours,) = torch.autograd.grad(routing.aux_loss, router.weight, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, router.weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(counts=st.lists(st.integers(0, 1000), min_size=8, max_size=8), rate=st.sampled_from([1e-3, 0.0]))
def test_bias_update_is_centred_and_goes_against_the_load(counts, rate):
    model = random_model(small_config())
    before = {name: router.e_score_correction_bias.clone() for name, router in model.routers()}
    loads = torch.tensor(counts)
    update_router_bias(model, {"layers.2.mlp.router": loads}, rate)
    after = {name: router.e_score_correction_bias for name, router in model.routers()}
    assert torch.equal(after["layers.1.mlp.router"], before["layers.1.mlp.router"])
    step = (after["layers.2.mlp.router"] - before["layers.2.mlp.router"]).double()
    signs = [(sum(counts) > 8 * c) - (sum(counts) < 8 * c) for c in counts]
    expected = [rate * (s - sum(signs) / 8) for s in signs]
    torch.testing.assert_close(step, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)
    assert abs(step.sum().item()) < 1e-6
