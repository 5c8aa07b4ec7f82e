"""One transformer layer: x += attention(norm(x)); x += feed-forward(norm(x)). Pre-norm, no biases, no dropout.

A block is the unit of FSDP wrapping, of compilation and of activation checkpointing. The latter is a setting of the
block, not a wrapper, so that parameter names never change and FSDP's hooks stay outside of what is recomputed:

- "none": every intermediate is kept for backward.
- "selective": outputs of matmuls and attention are kept; norms, activations and permutations are computed again.
- "full": only the block's input is kept; backward runs the block again.

A mixture layer runs in pieces: up to the choice of experts, shared and routed experts, and the sum. In the middle one rows travel
to the ranks of their experts and back, behind the shared experts (pipeline/parallel/flight.py). It has its gradients by hand, which
keep what "selective" keeps whatever the setting, and kernels of its own, so nothing is left to compile; and neither a compiled
graph nor selective checkpointing reaches over exchanges: their sizes change with every batch, and twice the communication
costs more than keeping what arrived. `compile()` makes the first and the last piece one graph each, selective checkpointing inside
of it (pipeline/model/recomputation.py says why); full checkpointing goes around the pieces and their exchanges. With `SequenceLayout.halves`
the two halves of the rows go through the pieces in turn (pipeline/model/interleave.py).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.config.schema import ModelConfig
from pipeline.model.attention import Attention
from pipeline.model.cache import LayerCache
from pipeline.model.experts import MLP, MoE
from pipeline.model.interleave import Paused, in_turn
from pipeline.model.norm import RMSNorm
from pipeline.model.offload import Offload
from pipeline.model.recomputation import keeping_matmuls
from pipeline.model.router import Routing
from pipeline.model.sequences import SequenceLayout
from pipeline.parallel.dispatch import Plan


class BlockOutput(NamedTuple):
    x_BSD: Tensor
    aux_loss: Tensor | None  # None: a dense layer
    tokens_per_expert_E: Tensor | None


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, aux_loss_weight: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: MLP | MoE
        if layer < config.first_k_dense_replace:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)
        else:
            self.mlp = MoE(config, aux_loss_weight)
        self.activation_checkpointing: Literal["none", "selective", "full"] = "none"
        self.layer = layer
        self.offload: Offload | None = None  # of the network, if activations wait on the host

    def forward(self, x_BSD: Tensor, layout: SequenceLayout, cached: LayerCache | None = None) -> BlockOutput:
        if cached is not None:
            return self._run_cached(x_BSD, layout, cached)
        if self.offload is None or not torch.is_grad_enabled():
            return self._checkpointed(x_BSD, layout)
        shared = [*self.parameters(), *layout.tensors()]
        return self.offload.run(self.layer, lambda: self._checkpointed(x_BSD, layout), lambda out: out.x_BSD, shared)

    def _checkpointed(self, x_BSD: Tensor, layout: SequenceLayout) -> BlockOutput:
        if self.activation_checkpointing == "full" and torch.is_grad_enabled():
            return checkpoint(self._run, x_BSD, layout, use_reentrant=False, preserve_rng_state=False)
        return self._run(x_BSD, layout)

    def compile(self, **options: Any) -> None:
        """Compile the pieces; `options` are those of `torch.compile`. A piece that is not one graph is an error."""
        self._dense = torch.compile(self._dense, fullgraph=True, **options)  # type: ignore[method-assign]
        self._to_experts = torch.compile(self._to_experts, fullgraph=True, **options)  # type: ignore[method-assign]
        self._from_experts = torch.compile(self._from_experts, fullgraph=True, **options)  # type: ignore[method-assign]

    def _run(self, x_BSD: Tensor, layout: SequenceLayout) -> BlockOutput:
        selective = self.activation_checkpointing == "selective" and torch.is_grad_enabled()
        if isinstance(self.mlp, MLP):
            return BlockOutput(self._dense(x_BSD, layout, selective), None, None)
        if layout.halves is None:
            ((x_BSD, routing),) = in_turn(self._mixture(x_BSD, layout, selective))
            return BlockOutput(x_BSD, routing.aux_loss, routing.tokens_per_expert_E)
        halves = zip(x_BSD.chunk(2), layout.halves)
        (x0_BSD, first), (x1_BSD, second) = in_turn(*(self._mixture(x_BSD, half, selective) for x_BSD, half in halves))
        sequences = [half.sequences for half in layout.halves]
        aux_loss = first.aux_loss * sequences[0] + second.aux_loss * sequences[1]
        counts_E = first.tokens_per_expert_E + second.tokens_per_expert_E
        return BlockOutput(torch.cat([x0_BSD, x1_BSD]), aux_loss / max(sum(sequences), 1), counts_E)

    def _mixture(self, x_BSD: Tensor, layout: SequenceLayout, selective: bool) -> Paused[tuple[Tensor, Routing]]:
        """The pieces of a mixture layer; pauses while rows travel."""
        assert isinstance(self.mlp, MoE)
        x_BSD, h_BSD, routing, plan = self._to_experts(x_BSD, layout, selective)
        shared_BSD, routed_ND = yield from self.mlp.mixing(h_BSD, routing, plan, layout)
        return self._from_experts(x_BSD, shared_BSD, routed_ND), routing

    def _run_cached(self, x_BSD: Tensor, layout: SequenceLayout, cached: LayerCache) -> BlockOutput:
        """Without gradients, and not compiled: every pass has other shapes."""
        assert not torch.is_grad_enabled(), "a cached pass has no backward"
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), layout, cached)
        h_BSD = self.post_attention_layernorm(x_BSD)
        if isinstance(self.mlp, MLP):
            return BlockOutput(x_BSD + self.mlp(h_BSD), None, None)
        out = self.mlp(h_BSD, layout)
        return BlockOutput(x_BSD + out.x_BSD, out.aux_loss, out.tokens_per_expert_E)

    def _dense(self, x_BSD: Tensor, layout: SequenceLayout, selective: bool) -> Tensor:
        def run(x_BSD: Tensor) -> Tensor:
            x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), layout)
            return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))

        return keeping_matmuls(run, x_BSD) if selective else run(x_BSD)

    def _to_experts(
        self, x_BSD: Tensor, layout: SequenceLayout, selective: bool
    ) -> tuple[Tensor, Tensor, Routing, Plan | None]:
        mixture = self.mlp
        assert isinstance(mixture, MoE)

        def run(x_BSD: Tensor) -> tuple[Tensor, Tensor, Routing, Plan | None]:
            x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), layout)
            h_BSD = self.post_attention_layernorm(x_BSD)
            return x_BSD, h_BSD, *mixture.route(h_BSD, layout)

        return keeping_matmuls(run, x_BSD) if selective else run(x_BSD)

    def _from_experts(self, x_BSD: Tensor, shared_BSD: Tensor, routed_ND: Tensor) -> Tensor:
        return x_BSD + (shared_BSD + routed_ND.view_as(x_BSD))
