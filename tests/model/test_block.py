"""Activation checkpointing and torch.compile change memory and speed, never numbers or counts."""

import pytest
import torch

from tests.model.oracle import random_model, small_config


def step(mode: str, backend: str | None = None):
    model = random_model(small_config(), aux_loss_weight=1e-2)
    for block in model.layers:
        block.activation_checkpointing = mode
        if backend is not None:
            block.compile(fullgraph=True, backend=backend)
    ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    out = model(ids, ids)
    (out.loss_sum + out.aux_loss).backward()
    counts = [router.tokens_per_expert.clone() for _, router in model.routers()]
    return out, {name: p.grad for name, p in model.named_parameters()}, counts


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_gives_the_same_step_and_counts_once(mode):
    plain, gradients, counts = step("none")
    out, same, recounted = step(mode)
    assert torch.equal(out.loss_sum, plain.loss_sum)
    assert torch.equal(out.aux_loss, plain.aux_loss)
    assert all(torch.equal(same[name], gradients[name]) for name in gradients)
    for once, again in zip(counts, recounted, strict=True):
        assert torch.equal(once, again)
        assert once.sum() == 2 * 24 * 3


def saved_bytes(mode: str) -> int:
    model = random_model(small_config())
    for block in model.layers:
        block.activation_checkpointing = mode
    seen: dict[int, int] = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(0, 96, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids, ids)
    return sum(seen.values())


def test_full_checkpointing_keeps_less():
    assert saved_bytes("full") < 0.6 * saved_bytes("none")


def test_counts_add_up_over_micro_batches_and_not_in_evaluation():
    model = random_model(small_config())
    ids = torch.randint(0, 96, (2, 24))
    model(ids, ids)
    model(ids, ids)
    model.eval()
    model(ids)
    assert [int(router.tokens_per_expert.sum()) for _, router in model.routers()] == [2 * 144, 2 * 144]


@pytest.mark.parametrize(
    ("mode", "backend"),
    [("none", "aot_eager"), ("full", "aot_eager"), pytest.param("none", "inductor", marks=pytest.mark.long)],
)
def test_a_block_compiles_to_one_graph(mode, backend):
    plain, gradients, counts = step("none")
    out, same, recounted = step(mode, backend)
    assert out.loss_sum.item() == pytest.approx(plain.loss_sum.item(), rel=1e-5)
    for name, gradient in gradients.items():
        assert (same[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
    assert all(torch.equal(once, again) for once, again in zip(counts, recounted, strict=True))
