"""The mixture layer against transformers', its hand-written gradients, and experts that get nothing."""

import pytest
import torch
from torch.nn import functional as F

from pipeline.model.experts import MLP, MoE
from pipeline.parallel.dispatch import Choices
from tests.model.oracle import random_model, small_config


def test_layer_equals_a_loop_over_experts():
    config = small_config()
    layer = random_model(config).layers[1].mlp
    x_BSD = torch.randn(2, 9, config.hidden_size, generator=torch.Generator().manual_seed(1))
    out = layer(x_BSD)
    routing = layer.router(x_BSD)
    x_ND = x_BSD.flatten(0, 1)
    stacks = layer.experts
    expected_ND = layer.shared_experts(x_ND).detach().clone()
    for n in range(18):
        for e, w in zip(routing.experts_NK[n], routing.weights_NK[n]):
            hidden = F.silu(x_ND[n] @ stacks.gate_proj[e].T) * (x_ND[n] @ stacks.up_proj[e].T)
            expected_ND[n] = expected_ND[n] + w * (hidden @ stacks.down_proj[e].T)
    torch.testing.assert_close(out.x_BSD.flatten(0, 1), expected_ND, rtol=1e-4, atol=1e-5)


def test_experts_without_rows_get_zero_gradients():
    config = small_config()
    layer: MoE = random_model(config).layers[1].mlp
    layer.router.e_score_correction_bias.copy_(torch.tensor([0.0, 9, 9, 9, 0, 0, 0, 0]))  # all take 1, 2, 3
    x_BSD = torch.randn(1, 5, config.hidden_size, requires_grad=True)
    out = layer(x_BSD)
    out.x_BSD.square().sum().backward()
    assert out.tokens_per_expert_E.tolist() == [0, 5, 5, 5, 0, 0, 0, 0]
    for stack in (layer.experts.gate_proj, layer.experts.up_proj, layer.experts.down_proj):
        used = stack.grad.flatten(1).norm(dim=1) > 0
        assert used.tolist() == [False, True, True, True, False, False, False, False]
        assert torch.equal(stack.grad[[0, 4, 5, 6, 7]], torch.zeros_like(stack.grad[[0, 4, 5, 6, 7]]))


def test_widths_that_the_kernel_cannot_take_are_refused():
    with pytest.raises(ValueError, match=r"moe_intermediate_size 20 must be a multiple of 8"):
        MoE(small_config(moe_intermediate_size=20), 0.0)


def test_no_tokens_at_all_gives_empty_output_and_zero_gradients():
    config = small_config()
    layer = random_model(config).layers[1].mlp
    rows = torch.zeros(0, config.hidden_size, requires_grad=True)
    out = layer.experts(rows, Choices(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3), 0, True))
    assert out.shape == rows.shape
    out.square().sum().backward()
    assert torch.equal(layer.experts.gate_proj.grad, torch.zeros_like(layer.experts.gate_proj))


def test_an_mlp_in_two_parts_is_the_mlp():
    mlp = MLP(8, 16)
    x = torch.randn(3, 5, 8, requires_grad=True)
    whole = mlp(x)
    parts = mlp.finish(x, *mlp.first(x))
    torch.testing.assert_close(parts, whole)
    upstream, inputs = torch.randn_like(whole), (x, *mlp.parameters())
    for ours, theirs in zip(torch.autograd.grad(parts, inputs, upstream), torch.autograd.grad(whole, inputs, upstream)):
        torch.testing.assert_close(ours, theirs)
