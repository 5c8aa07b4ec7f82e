"""Sharding: who holds what, that initial weights do not depend on it, and refusals."""

from types import SimpleNamespace
from typing import cast
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from pipeline.config.schema import ModelConfig, ParallelismConfig, TrainingConfig
from pipeline.model import attention
from pipeline.model.moonlight import Moonlight
from pipeline.parallel.local import local_part, local_tensor
from pipeline.parallel.mesh import Meshes, build_meshes
from pipeline.parallel.shard import _expert_dim, compute_dtype, shard_model
from tests.distributed import run_distributed

CPU = torch.device("cpu")
TRAINING = TrainingConfig(sequence_length=16)
GATE = "layers.1.mlp.experts.gate_proj"


def network(experts: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, intermediate_size=24, moe_intermediate_size=8, n_routed_experts=experts,
        n_shared_experts=1, num_experts_per_tok=2, max_position_embeddings=16,
    )  # fmt: skip


def sharded(experts: int, **parallelism: int) -> Moonlight:
    with torch.device("meta"):
        model = Moonlight(network(experts))
    shard_model(model, build_meshes(ParallelismConfig(**parallelism), "cpu"), TRAINING, CPU)
    model.to_empty(device=CPU)
    model.reset_parameters(3)
    return model


def parts(cases: list[tuple[int, dict]]) -> list[tuple[dict, str]]:
    """Per case: every parameter's box and values on this rank, and the placement of the experts."""
    found = []
    for experts, parallelism in cases:
        model = sharded(experts, **parallelism)
        held = {name: (local_part(p), local_tensor(p).detach().numpy().copy()) for name, p in model.named_parameters()}
        assert all(isinstance(p, DTensor) for p in model.parameters())
        found.append((held, str(model.get_parameter(GATE).placements)))
    return found


CASES = [
    (8, {"shard": 4, "ep": 2}),
    (6, {"shard": 4, "ep": 2}),  # three experts a rank of ep, cut into 2 and 1
    (2, {"shard": 4, "ep": 2}),  # fewer experts than ranks
    (4, {"replicate": 2, "shard": 2, "ep": 2}),
    (3, {"shard": 4}),
]


def test_experts_that_cannot_be_cut_are_refused():
    """Two experts on three ranks of 8 rows each: 8 does not go into 3 parts."""
    meshes = SimpleNamespace(sparse={"efsdp": SimpleNamespace(size=lambda: 3), "ep": SimpleNamespace(size=lambda: 1)})
    with torch.device("meta"):
        model = Moonlight(network(2))
    experts = model.get_submodule(GATE.rpartition(".")[0])
    with pytest.raises(
        ValueError, match=r"gate_proj \(2, 8, 16\): 2 experts are fewer than efsdp \* ep = 3 ranks, and dim 1"
    ):
        _expert_dim("experts", experts, cast(Meshes, meshes))


def test_compilation_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with torch.device("meta"):
        model = Moonlight(network(4))
    compiled = TRAINING.model_copy(update={"compile": True, "activation_checkpointing": "none"})
    with pytest.raises(ValueError, match=r"training\.compile true: .* no gcc, clang or cc on the PATH"):
        shard_model(model, build_meshes(ParallelismConfig(), "cpu"), compiled, CPU)


def test_shards_are_slices_of_the_whole():
    """On 4 ranks, each case: the values are those of one process, every element is held once per replica."""
    by_rank = run_distributed(parts, 4, CASES)
    for index, (experts, parallelism) in enumerate(CASES):
        whole = Moonlight(network(experts))
        whole.reset_parameters(3)
        for name, parameter in whole.named_parameters():
            times = torch.zeros(parameter.shape)
            for held, _ in (found[index] for found in by_rank):
                part, values = held[name]
                assert np.array_equal(values, parameter[part].detach()), name
                times[part] += 1
            assert (times == parallelism.get("replicate", 1)).all(), name
    placements = [by_rank[0][index][1] for index in range(len(CASES))]
    assert placements == [
        "(_StridedShard(dim=0, sf=2), Shard(dim=0))",
        "(_StridedShard(dim=0, sf=2), Shard(dim=0))",
        "(Shard(dim=1), Shard(dim=0))",
        "(Replicate(), _StridedShard(dim=0, sf=2), Shard(dim=0))",
        "(Shard(dim=1),)",
    ]


def prefetched() -> dict[str, tuple[list[str], list[str]]]:
    """What each unit gathers ahead, forward and backward, by name."""
    model = sharded(4, shard=2, ep=2)
    states = {name: m._get_fsdp_state() for name, m in model.named_modules() if isinstance(m, FSDPModule)}
    names = {id(state): name for name, state in states.items()}
    return {
        name: (
            [names[id(s)] for s in state._states_to_forward_prefetch],
            [names[id(s)] for s in state._states_to_backward_prefetch],
        )
        for name, state in states.items()
    }


def test_weights_are_gathered_one_unit_ahead():
    """Final norm and head are one unit, known by the head's name."""
    expected = {
        "": ([], []),
        "embed_tokens": (["layers.0"], []),
        "layers.0": (["layers.1"], ["embed_tokens"]),
        "layers.1": (["lm_head"], ["layers.0"]),
        "norm": ([], ["layers.1"]),
        "lm_head": ([], ["layers.1"]),
    }
    assert run_distributed(prefetched, 2)[0] == expected


def dtypes_inside(document_mask: bool) -> dict[str, set[torch.dtype]]:
    """What reaches the parts of a network under mixed precision."""
    with torch.device("meta"):
        model = Moonlight(network(4), aux_loss_weight=1e-4)
    training = TRAINING.model_copy(update={"compute_dtype": "bf16"})
    shard_model(model, build_meshes(ParallelismConfig(), "cpu"), training, CPU)
    model.to_empty(device=CPU)
    model.reset_parameters(3)
    seen: dict[str, set[torch.dtype]] = {}

    def note(name: str, *tensors: torch.Tensor) -> None:
        seen.setdefault(name, set()).update(tensor.dtype for tensor in tensors)

    rotate, scores = attention.rotate_pairs, Tensor.sigmoid
    with (
        mock.patch.object(
            attention,
            "rotate_pairs",
            lambda x, at: (note("tables", at.cos, at.sin), note("rotated", x), rotate(x, at))[2],
        ),
        mock.patch.object(Tensor, "sigmoid", lambda x: (note("router logits", x), scores(x))[1]),
    ):
        for block in model.layers:
            block.register_forward_pre_hook(lambda _, inputs: note("block", inputs[0]))
        model.lm_head.register_forward_pre_hook(lambda _, inputs: note("head", inputs[0]))
        ids = torch.randint(2, 30, (2, 16))
        out = model(ids, ids, [[7, 9], [16]] if document_mask else None)
        note("loss", out.loss_sum, out.aux_loss)
        out.loss_sum.backward()
        note("gradients", *(local_tensor(p.grad) for p in model.parameters()))
    return seen


@pytest.mark.parametrize("document_mask", [False, True])
def test_mixed_precision_leaves_tables_router_and_loss_in_fp32(document_mask):
    assert run_distributed(dtypes_inside, 1, document_mask)[0] == {
        **{name: {torch.bfloat16} for name in ("block", "rotated", "head")},
        **{name: {torch.float32} for name in ("tables", "router logits", "loss", "gradients")},
    }


def test_dtypes():
    cuda = torch.device("cuda", 0)
    assert compute_dtype(TRAINING, CPU) is torch.float32
    assert compute_dtype(TRAINING, cuda) is torch.bfloat16
    assert compute_dtype(TRAINING.model_copy(update={"compute_dtype": "bf16"}), CPU) is torch.bfloat16
