"""The mixture layer against transformers', its hand-written gradients, and experts that get nothing."""

import pytest
import torch
from torch.nn import functional as F

from pipeline.model.experts import MoE, SortRows, WeightedSum, gather_sum
from tests.model.oracle import random_model, small_config


def permutation(rows, seed=0):
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return order, order.argsort()


def test_row_gathers_have_the_right_gradients():
    order_M, inverse_M = permutation(6)
    inverse_NK = inverse_M.view(3, 2)
    x_ND = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    rows_MD = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weights_NK = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SortRows.apply, (x_ND, order_M, inverse_NK, None))
    assert torch.autograd.gradcheck(WeightedSum.apply, (rows_MD, weights_NK, order_M, inverse_NK))
    assert torch.equal(SortRows.apply(x_ND, order_M, inverse_NK, None), x_ND.repeat_interleave(2, 0)[order_M])


@pytest.mark.parametrize(("tokens", "choices"), [(5, 3), (4, 1), (0, 2)])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_cpus_embedding_bag_is_the_plain_sum(tokens, choices, weighted):
    generator = torch.Generator().manual_seed(0)
    rows_MD = torch.randn(7, 12, generator=generator)
    index_NK = torch.randint(0, 7, (tokens, choices), generator=generator)
    weights_NK = torch.rand(tokens, choices, generator=generator) if weighted else None
    plain = gather_sum(rows_MD.double(), index_NK, weights_NK)  # not for fp32 only
    out = gather_sum(rows_MD, index_NK, weights_NK)
    assert out.dtype == torch.float32
    assert out.shape == (tokens, 12)
    torch.testing.assert_close(out.double(), plain, rtol=1e-6, atol=1e-6)


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
    out = layer.experts(rows, torch.zeros(8, dtype=torch.int64))
    assert out.shape == rows.shape
    out.square().sum().backward()
    assert torch.equal(layer.experts.gate_proj.grad, torch.zeros_like(layer.experts.gate_proj))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_applied_in_fp32(dtype):
    order_M, inverse_M = permutation(8)
    rows_MD = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights_NK = torch.rand(4, 2)
    out = WeightedSum.apply(rows_MD, weights_NK, order_M, inverse_M.view(4, 2))
    exact = (rows_MD[inverse_M].view(4, 2, 16).double() * weights_NK[..., None].double()).sum(1)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
