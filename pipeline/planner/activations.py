"""What one token leaves behind in forward for backward, in bytes: arithmetic on the network's shapes.

Counted is what autograd saves, tensor by tensor, each storage once, as the blocks in `pipeline/model` compute it:

- "none": every input of a matmul, of attention, of a norm, of an activation or a permutation;
- "selective": the inputs of a block's pieces and the outputs of matmuls and attention (pipeline/model/recomputation.py);
- routed and shared experts, either way: their input, gate and up (pipeline/model/expert_products.py);
- "full": the block's input.

A checkpointed block needs, besides, what "none" keeps, while its own backward runs: `block_bytes(..., "none")` once.
tests/planner/test_activations.py counts what autograd really saves and compares. The attention of CUDA is meant, which
keeps no scores; torch.compile keeps less, since it computes elementwise steps again.

Legend: D hidden, H heads, Q query/key width, V value width, C latent, K experts per token, E experts, F expert width.
"""

from __future__ import annotations

from typing import Literal

from pipeline.config.schema import ModelConfig
from pipeline.parallel.dispatch import ranks_met

Checkpointing = Literal["none", "selective", "full"]
FP32, INDEX = 4, 8


def block_bytes(
    model: ModelConfig, *, moe: bool, checkpointing: Checkpointing, itemsize: int, ep: int = 1, room: float = 1.0
) -> int:
    """Bytes a token that one block keeps until backward; `itemsize` of the compute dtype, experts over `ep` ranks that have
    `room` times the rows of even routing."""
    D, H, K = model.hidden_size, model.num_attention_heads, model.num_experts_per_tok
    Q, V, C = model.qk_head_dim, model.v_head_dim, model.kv_lora_rank
    latent = C + model.qk_rope_head_dim
    keys_values = H * (model.qk_nope_head_dim + V)
    width = model.shared_intermediate_size if moe else model.intermediate_size
    F, E = model.moe_intermediate_size, model.n_routed_experts
    if checkpointing == "full":
        return D * itemsize
    log_sum_exp = H * FP32
    met = (
        room * ranks_met(E, K, ep) if moe and ep > 1 else 0.0
    )  # rows that travel for a token, and that arrive for each
    travel = round(met * 3 * INDEX)  # of a row that left: which it is, and where it came back
    if checkpointing == "selective":
        attention = H * Q + latent + keys_values + H * V + D
        feed_forward = 2 * width if moe else 2 * width + D
        routed = D + round(met * D) + round(room * K * 2 * F) if moe else 0  # input, rows that arrived, gate and up
        router = (E + K) * FP32 + (3 * K + 1) * INDEX + travel if moe else 0  # scores; weights, where rows are
        return (D + attention + feed_forward + routed) * itemsize + router + log_sum_exp
    # x and its norm, twice; the latent and its norm; query, key, value, output
    attention = 4 * D + latent + C + 2 * H * Q + keys_values + H * V
    feed_forward = (2 if moe else 4) * width  # gate, up, of a dense layer silu(gate) and their product
    norms = 3 * FP32
    if not moe:
        return (attention + feed_forward) * itemsize + norms + log_sum_exp
    routed = round(met * D) + round(room * K * 2 * F)  # rows that arrived, gate and up
    # Scores, weights twice; the choice, and where rows are.
    router = (E + 3 * K + 2) * FP32 + (4 * K + 1) * INDEX + travel
    return (attention + feed_forward + routed) * itemsize + router + norms + log_sum_exp


def offloaded_bytes(
    model: ModelConfig, *, moe: bool, checkpointing: Checkpointing, itemsize: int, ep: int = 1, room: float = 1.0
) -> int:
    """Of `block_bytes`, what training.offload_activations sends to the host: everything as wide as a row. Numbers a row stay, as
    they are small, and of selective checkpointing what its pieces keep, which autograd does not see."""
    K, F = model.num_experts_per_tok, model.moe_intermediate_size
    if checkpointing == "full" or (checkpointing == "selective" and not moe):
        return model.hidden_size * itemsize
    if checkpointing == "selective":
        met = room * ranks_met(model.n_routed_experts, K, ep) if ep > 1 else 0.0
        rows = 2 * model.hidden_size + round(
            met * model.hidden_size
        )  # the block's input, the experts', those that arrived
        return (rows + 2 * model.shared_intermediate_size + round(room * K * 2 * F)) * itemsize
    everything = block_bytes(model, moe=moe, checkpointing="none", itemsize=itemsize, ep=ep, room=room)
    return everything - block_bytes(model, moe=moe, checkpointing="none", itemsize=0, ep=ep, room=room)
