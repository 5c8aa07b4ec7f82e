"""The formula against what autograd and selective checkpointing really keep for a block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.schema import ModelConfig
from pipeline.model.block import Block
from pipeline.model.recomputation import KEPT
from pipeline.model.sequences import SequenceLayout, sequence_layout
from pipeline.parallel.rows import place
from pipeline.planner.activations import block_bytes

S = 256
MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=256,
    num_attention_heads=4,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=40,
    intermediate_size=704,
    moe_intermediate_size=176,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
)
HEADS, FP32 = MODEL.num_attention_heads, 4


def block_and_input(moe: bool) -> tuple[Block, Tensor, SequenceLayout]:
    block = Block(MODEL, int(moe), 1e-4)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    layout = sequence_layout(1, S, None, rope_dim=MODEL.qk_rope_head_dim, rope_theta=1e4, device=torch.device("cpu"))
    return block, torch.randn(1, S, MODEL.hidden_size, requires_grad=True), layout


def is_scores(tensor: Tensor) -> bool:
    """The packed probabilities of our CPU attention (pipeline/model/cpu_attention.py), which CUDA does not keep."""
    return tensor.dim() == 1 and tensor.is_floating_point() and tensor.numel() > S * MODEL.num_experts_per_tok


@pytest.mark.parametrize("moe", [False, True])
def test_without_checkpointing(moe: bool) -> None:
    block, x, layout = block_and_input(moe)
    shared = [*block.parameters(), layout.cos, layout.sin]  # neither is kept for this block alone
    seen = {tensor.untyped_storage().data_ptr(): tensor.detach() for tensor in shared}

    def pack(tensor: Tensor) -> Tensor:
        seen.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x, layout)
    kept = list(seen.values())[len(shared) :]
    scores = [tensor for tensor in kept if is_scores(tensor)]
    assert len(scores) == 1  # the attention of a CPU keeps its probabilities
    cpu = sum(tensor.untyped_storage().nbytes() for tensor in kept) - scores[0].untyped_storage().nbytes()
    # On CUDA instead: a log-sum-exp a head, values as a view of [keys | values].
    cuda = HEADS * FP32 + HEADS * MODEL.qk_nope_head_dim * FP32
    expected = block_bytes(MODEL, moe=moe, checkpointing="none", itemsize=FP32)
    assert cpu / S + cuda == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("moe", [False, True])
def test_selective(moe: bool) -> None:
    """Outputs of kept operators, and what crosses from one piece of the block to the next."""
    block, x, layout = block_and_input(moe)
    block.activation_checkpointing = "selective"
    kept = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal kept
            result = op(*args, **(kwargs or {}))
            if op.name() in KEPT:
                outputs = result if isinstance(result, tuple) else (result,)
                kept += sum(out.nbytes for out in outputs if not is_scores(out))
            return result

    with Count():
        block._to_experts(x, layout, True) if moe else block(x, layout)
    if moe:  # what experts keep by hand
        h_BSD, routing = block._to_experts(x, layout, False)[1:3]
        placing = place(routing.experts_NK, 8, routing.experts_NK.numel(), all_chosen=True)
        gate_up = 2 * (S * MODEL.shared_intermediate_size + routing.experts_NK.numel() * MODEL.moe_intermediate_size)
        kept += h_BSD.nbytes + routing.weights_NK.nbytes + sum(t.nbytes for t in placing[:4]) + gate_up * FP32
    expected = block_bytes(MODEL, moe=moe, checkpointing="selective", itemsize=FP32)
    assert kept / S + x.nbytes / S + HEADS * FP32 == pytest.approx(expected, rel=1e-3)


def test_full_keeps_the_input_alone() -> None:
    assert block_bytes(MODEL, moe=True, checkpointing="full", itemsize=2) == MODEL.hidden_size * 2
