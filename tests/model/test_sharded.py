"""The network under FSDP2 and expert parallelism: initial weights, losses, gradients, files in and out, QK-clip."""

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from pipeline.model.hf import hf_tensors, load_hf
from pipeline.model.moonlight import Moonlight
from pipeline.model.qk_clip import qk_clip_
from tests.distributed import run_distributed
from tests.model.oracle import random_model, small_config
from tests.model.sharded import sharded_model

CONFIG = small_config(n_routed_experts=6)


def check_rank(ep: int, folder: str) -> float:
    rank, world = dist.get_rank(), dist.get_world_size()
    model = sharded_model(CONFIG, ep, seed=3, aux_loss_weight=1e-2)
    whole = Moonlight(CONFIG, aux_loss_weight=1e-2)
    whole.reset_parameters(3)
    assert_same(model, whole)

    ids = torch.randint(0, 96, (world, 24), generator=torch.Generator().manual_seed(0))
    out = model(ids[rank : rank + 1], ids[rank : rank + 1])
    (out.loss_sum + out.aux_loss / world).backward()
    expected = whole(ids, ids)
    (expected.loss_sum + expected.aux_loss).backward()
    total = out.loss_sum.detach().clone()
    dist.all_reduce(total)
    assert total.item() == pytest.approx(expected.loss_sum.item(), rel=1e-6)
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters()):
        error = (ours.grad.full_tensor() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 1e-5, (name, error)
    counts = model.layers[1].mlp.router.tokens_per_expert.clone()
    dist.all_reduce(counts)
    assert torch.equal(counts, whole.layers[1].mlp.router.tokens_per_expert)

    load_hf(model, folder)
    other = random_model(CONFIG, seed=9)
    assert_same(model, other)
    logits = torch.tensor([[50.0, 400.0], [100.0, 101.0], [torch.inf, -torch.inf]])
    assert qk_clip_(model, logits, 100.0) == qk_clip_(other, logits, 100.0) == 2
    assert_same(model, other)
    return total.item()


def assert_same(sharded: Moonlight, whole: Moonlight) -> None:
    expected = dict(hf_tensors(whole))
    names = []
    for name, tensor in hf_tensors(sharded):
        assert torch.equal(tensor, expected[name]), name
        names.append(name)
    assert names == list(expected)


@pytest.mark.parametrize(("world", "ep"), [(2, 2), (3, 1), (4, 2)])
def test_a_sharded_model_is_the_whole_model(world, ep, tmp_path):
    """(4, 2): three experts a rank on an efsdp axis of two, so strided and uneven shards."""
    tensors = {name: tensor.contiguous() for name, tensor in hf_tensors(random_model(CONFIG, seed=9))}
    save_file(tensors, tmp_path / "model.safetensors")
    losses = run_distributed(check_rank, world, ep, str(tmp_path))
    assert len(set(losses)) == 1
