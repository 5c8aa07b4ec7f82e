"""Selective activation checkpointing (Korthikanti et al., arXiv 2205.05198): keep what is dear, compute the rest again.

`keeping_matmuls(function, *inputs)` keeps the outputs of matrix products and attention for backward; norms,
activations, rotary embedding and permutations are computed once more there.

Where a function is compiled, this call belongs inside of what `torch.compile` sees. There the kept operators are marks
on the graph that its partitioner obeys. Around a compiled function the same call gives wrong gradients without a word
(torch 2.13; pytorch issue 161889): it remembers the tensors that kept operators returned, while Inductor's code, which
has no further use for some of them, writes the next intermediate into their memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

KEPT = {  # by name: the module that registers an operator may not have been loaded
    "aten::mm",
    "aten::mm.dtype",
    "aten::addmm",
    "aten::bmm",
    "moonlight::linear",
    "moonlight::causal_attention",
    "moonlight::largest_logits",
    "torch_attn::_varlen_attn",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
}


def keeping_matmuls(function: Callable[..., Any], *inputs: Any) -> Any:
    """function(*inputs)."""
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
