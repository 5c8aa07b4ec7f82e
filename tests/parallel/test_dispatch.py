"""Experts spread over ranks give what experts on one rank give: outputs and gradients."""

from itertools import groupby
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from pipeline.model import expert_products, mlp_products, row_products
from pipeline.model.experts import MoE
from pipeline.parallel.bounded import BoundedDispatch, Room
from pipeline.parallel.device_flight import Wire
from pipeline.parallel.dispatch import AllToAllDispatch, Choices, LocalDispatch, ranks_met
from tests.distributed import run_distributed
from tests.model.oracle import random_model, small_config

TOKENS = 6  # a rank


def inputs(rank: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(1, tokens, 64, generator=generator)


def layer_with_bias(bias: list[float]) -> MoE:
    layer = random_model(small_config(n_routed_experts=len(bias))).layers[1].mlp
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


SKEWED = [9.0, 9, 9, 0, 0, 0, 0, 0]
BOUNDED = [  # bias, tokens, capacity
    ([0.0] * 8, [6, 6], 2.0),
    (SKEWED, [5, 5], 2.0),  # all that one rank can be asked for
]


def run_cases(world: int) -> list[dict[str, torch.Tensor]]:
    return [run_case(bias, tokens) for bias, tokens in CASES[world]]


def run_bounded() -> list[dict[str, torch.Tensor]]:
    return [run_case(*case) for case in [*BOUNDED, (SKEWED, [6, 6], 1.0)]]


def run_case(
    bias: list[float], tokens: list[int], capacity: float | None = None, wire: Wire | None = None
) -> dict[str, torch.Tensor]:
    """This rank's tokens through a layer whose experts are spread over all ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    layer = layer_with_bias(bias)
    share = len(bias) // world
    for name, stack in list(layer.experts.named_parameters()):
        setattr(layer.experts, name, torch.nn.Parameter(stack.detach()[rank * share : (rank + 1) * share].clone()))
    group = dist.group.WORLD
    layer.experts.dispatcher = (
        AllToAllDispatch(group) if capacity is None else BoundedDispatch(group, Room(capacity), wire=wire)
    )
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


def test_fixed_buffers_give_the_same_and_nothing_is_lost_in_silence():
    by_rank = run_distributed(run_bounded, 2)
    for case, (bias, tokens, _) in enumerate(BOUNDED):
        check_case(bias, tokens, [results[case] for results in by_rank])
    assert all(results[-1]["out"].isnan().any() for results in by_rank)


def run_both_ways() -> list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    return [(run_case(bias, tokens, capacity), run_case(bias, tokens)) for bias, tokens, capacity in BOUNDED]


def test_fixed_buffers_give_the_bits_of_buffers_that_fit():
    for results in run_distributed(run_both_ways, 2):
        for fixed, fitting in results:
            for name, tensor in fitting.items():
                assert torch.equal(fixed[name], tensor), name


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


class Watched:
    """A collective under way that says when it is awaited."""

    def __init__(self, work: Any, events: list[str]) -> None:
        self.work, self.events = work, events

    def wait(self) -> None:
        self.events.append("wait")
        self.work.wait()


def trace_of_a_layer() -> list[str]:
    """Exchanges of one layer, forward and backward, and when the shared experts are at work."""
    events: list[str] = []
    layer = layer_with_bias([0.0] * 8)
    share = 8 // dist.get_world_size()
    for name, stack in list(layer.experts.named_parameters()):
        setattr(layer.experts, name, torch.nn.Parameter(stack.detach()[:share].clone()))
    layer.experts.dispatcher = AllToAllDispatch(dist.group.WORLD)
    exchange = dist.all_to_all_single

    def launch(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kind = "counts" if input.dtype == torch.int64 else "rows" if input.shape[1] == 64 else "weights"
        events.append(kind)
        work = exchange(output, input, *args, **kwargs)
        return work if work is None else Watched(work, events)

    def told(module: Any, name: str, event: str) -> Any:
        run = getattr(module, name)
        return mock.patch.object(module, name, lambda *a, **k: (events.append(event), run(*a, **k))[1])

    x_BSD = inputs(dist.get_rank(), TOKENS).requires_grad_()
    with (
        mock.patch.object(dist, "all_to_all_single", launch),
        told(mlp_products, "product", "shared"),
        told(mlp_products, "outer", "shared"),
        told(row_products, "grouped_linear", "experts"),
        told(expert_products, "grouped_outer", "weights of experts"),
    ):
        out = layer(x_BSD)
        events.append("backward")
        out.x_BSD.square().sum().backward()
    return events


def test_what_needs_no_rows_runs_while_they_travel():
    for events in run_distributed(trace_of_a_layer, 2):
        seen = [event for event, _ in groupby(events)]
        turn = seen.index("backward")
        assert seen[:turn] == ["counts", "weights", "rows", "shared", "wait", "experts", "rows", "shared", "wait"]
        assert seen[turn + 1 :] == [
            "rows", "shared", "wait", "experts", "weights", "rows", "weights of experts", "wait",
        ]  # fmt: skip


class Landed:
    def wait(self) -> None:
        pass


def test_a_token_travels_once_to_each_rank_that_it_meets():
    """E 64, K 6, 8 ranks, even routing: bytes against those of a row for each choice; each rank is sent what it sends."""
    N, D, E, K, W = 2048, 2048, 64, 6, 8
    sent = {"rows": 0, "weights": 0}

    def exchange(output: torch.Tensor, input: torch.Tensor, *_: Any, **__: Any) -> Landed:
        if input.dtype == torch.int64:
            output.copy_(input)
        else:
            sent["rows" if input.shape[1] == D else "weights"] += input.nbytes
            output.fill_(0.5)
        return Landed()

    experts_NK = torch.rand(N, E, generator=torch.Generator().manual_seed(0)).topk(K, dim=1).indices
    choices = Choices(experts_NK, torch.rand(N, K, requires_grad=True), N * K, True)
    dispatcher = AllToAllDispatch(cast(dist.ProcessGroup, SimpleNamespace(size=lambda: W)))
    x_ND = torch.empty(N, D, dtype=torch.bfloat16, requires_grad=True)
    plan = dispatcher.plan(choices, torch.bincount(experts_NK.flatten(), minlength=E))
    with mock.patch.object(dist, "all_to_all_single", exchange):
        journey = dispatcher.send(x_ND, choices, plan)
        rows_RD, arrived = journey.arrive()
        journey.send_back(rows_RD * arrived.weights_RC.sum(1, keepdim=True).bfloat16())
        journey.come_home().backward(torch.ones(N, D, dtype=torch.bfloat16))
    before = 4 * N * K * D * 2  # four ways
    assert sent["rows"] <= 0.78 * before
    assert sent["rows"] + sent["weights"] <= 0.78 * before
    assert sent["rows"] == pytest.approx(4 * N * D * 2 * ranks_met(E, K, W), rel=0.01)
