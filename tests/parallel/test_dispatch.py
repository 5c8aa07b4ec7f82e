"""Experts spread over ranks give what experts on one rank give: outputs and gradients."""

import pytest
import torch
import torch.distributed as dist

from pipeline.model.experts import MoE
from pipeline.parallel.dispatch import AllToAllDispatch, LocalDispatch
from tests.distributed import run_distributed
from tests.model.oracle import random_model, small_config

TOKENS = 6  # a rank


def inputs(rank: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(1, tokens, 64, generator=generator)


def layer_with_bias(bias: list[float]) -> MoE:
    layer = random_model(small_config()).layers[1].mlp
    layer.router.e_score_correction_bias.copy_(torch.tensor(bias))
    return layer


CASES = {
    2: [
        ([0.0] * 8, [6, 9]),
        ([0.0] * 8, [0, 7]),  # rank 0 has no tokens but the experts of others
        ([0.0] * 8, [0, 0]),
    ],
    4: [
        ([0.0] * 8, [5, 6, 7, 1]),
        ([9.0, 9, 9, 0, 0, 0, 0, 0], [6, 6, 6, 6]),  # ranks 2 and 3 hold experts that nobody chose
    ],
}


def run_cases(world: int) -> list[dict[str, torch.Tensor]]:
    return [run_case(bias, tokens) for bias, tokens in CASES[world]]


def run_case(bias: list[float], tokens: list[int]) -> dict[str, torch.Tensor]:
    """This rank's tokens through a layer whose experts are spread over all ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    layer = layer_with_bias(bias)
    share = 8 // world
    for name, stack in list(layer.experts.named_parameters()):
        setattr(layer.experts, name, torch.nn.Parameter(stack.detach()[rank * share : (rank + 1) * share].clone()))
    layer.experts.dispatcher = AllToAllDispatch(dist.group.WORLD)
    x_BSD = inputs(rank, tokens[rank]).requires_grad_()
    out = layer(x_BSD)
    out.x_BSD.square().sum().backward()
    assert out.x_BSD.shape == x_BSD.shape
    grads = {name: stack.grad for name, stack in layer.experts.named_parameters()}
    return {"out": out.x_BSD.detach(), "x": x_BSD.grad, "router": layer.router.weight.grad, **grads}


@pytest.mark.parametrize("world", [2, 4])
def test_outputs_and_gradients_equal_those_of_one_rank(world):
    by_rank = run_distributed(run_cases, world, world)
    for case, (bias, tokens) in enumerate(CASES[world]):
        check_case(bias, tokens, [results[case] for results in by_rank])


def check_case(bias: list[float], tokens: list[int], ranks: list[dict[str, torch.Tensor]]) -> None:
    layer = layer_with_bias(bias)
    assert isinstance(layer.experts.dispatcher, LocalDispatch)
    router_grad = torch.zeros_like(layer.router.weight)
    for rank in range(len(ranks)):
        x_BSD = inputs(rank, tokens[rank]).requires_grad_()
        out = layer(x_BSD).x_BSD
        out.square().sum().backward()
        torch.testing.assert_close(ranks[rank]["out"], out.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ranks[rank]["x"], x_BSD.grad, rtol=1e-4, atol=1e-5)
        router_grad += ranks[rank]["router"]
    torch.testing.assert_close(router_grad, layer.router.weight.grad, rtol=1e-4, atol=1e-5)
    for name, stack in layer.experts.named_parameters():
        together = torch.cat([result[name] for result in ranks])
        torch.testing.assert_close(together, stack.grad, rtol=1e-4, atol=1e-5)
        untouched = stack.grad.flatten(1).norm(dim=1) == 0
        assert torch.equal(together[untouched], torch.zeros_like(together[untouched]))


def count_collectives() -> list[str]:
    """Names of the collectives of one layer's forward and backward pass."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Collectives(TorchDispatchMode):
        names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace in ("c10d", "_c10d_functional"):
                self.names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    layer = layer_with_bias([0.0] * 8)
    share = 8 // dist.get_world_size()
    for name, stack in list(layer.experts.named_parameters()):
        setattr(layer.experts, name, torch.nn.Parameter(stack.detach()[:share].clone()))
    layer.experts.dispatcher = AllToAllDispatch(dist.group.WORLD)
    x_BSD = inputs(dist.get_rank(), TOKENS).requires_grad_()
    with Collectives() as collectives:
        out = layer(x_BSD)
        forward = len(collectives.names)
        out.x_BSD.square().sum().backward()
    assert forward == 3  # counts, rows there, rows back
    return collectives.names


def test_three_exchanges_forward_and_two_backward():
    for names in run_distributed(count_collectives, 2):
        assert len(names) == 5
        assert set(names) == {"alltoall_base_.default"}
