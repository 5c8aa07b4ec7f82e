"""The mixture-of-experts layer: route, bring tokens to their experts, three products there, bring the sums back, add shared experts.

Routed experts are SwiGLU MLPs held as stacks [E, out, in] and run by grouped matmuls (pipeline/model/grouped.py), whatever
the loads. A row is copied to its experts' places by a counting sort and their results are summed up again by a gather in
each direction (pipeline/parallel/rows.py): no scatter-add, so results do not depend on the order of atomics. A choice's
weight multiplies the activation between the products, which is narrower than the result, so results need not be kept
for its gradient. The shared experts are one ungated MLP of n_shared x F.

Where experts are spread over ranks the shared experts run while rows travel: gate and up behind the way there, down
behind the way back, and in backward the same (pipeline/parallel/flight.py).

Every row that reaches the experts belongs to one of them. Padding of packed rows stays behind: the number of tokens is
known on the host, its slots name no expert, cost nothing from here on and get only the shared experts' output. An expert
without rows gets a zero gradient.

Legend: N slots, K experts per token, M = tokens*K pairs (after dispatch: R rows and M pairs of this rank's experts), E
experts (e of them here), D hidden, F expert width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.schema import ModelConfig
from pipeline.model.grouped import ALIGNMENT, gate_up_linear, grouped_linear
from pipeline.model.matmul import Linear
from pipeline.model.recomputation import keeping_matmuls
from pipeline.model.router import Router, Routing
from pipeline.model.sequences import SequenceLayout
from pipeline.parallel.dispatch import Choices, Dispatcher, LocalDispatch, Plan
from pipeline.parallel.local import local_tensor
from pipeline.parallel.rows import copy_rows, place, sum_rows


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, width)
        self.up_proj = Linear(hidden, width)
        self.down_proj = Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate_proj(x), self.up_proj(x))

    def down(self, gate: Tensor, up: Tensor) -> Tensor:
        """What is left to do after the first two products."""
        return self.down_proj(F.silu(gate) * up)


class Experts(nn.Module):
    """All routed experts of a layer. Under expert parallelism the parameters hold this rank's slice of the stacks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, D, F_ = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        for field, size in (("hidden_size", D), ("moe_intermediate_size", F_)):
            if size % ALIGNMENT:
                raise ValueError(
                    f"model.{field} {size} must be a multiple of {ALIGNMENT}: grouped matmuls take rows of whole 16 bytes"
                )
        self.gate_proj = nn.Parameter(torch.empty(E, F_, D))
        self.up_proj = nn.Parameter(torch.empty(E, F_, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F_))
        self.dispatcher: Dispatcher = LocalDispatch()

    def forward(self, x_RD: Tensor, choices: Choices, selective: bool = False) -> Tensor:
        """y_RD: the weighted sum of each row's experts. `selective`: compute activations again in backward."""
        gate_eFD, up_eFD, down_eDF = map(local_tensor, (self.gate_proj, self.up_proj, self.down_proj))
        return self._multiply(x_RD, choices, gate_eFD, up_eFD, down_eDF, selective)

    def compile(self, **options: Any) -> None:
        """Compile what lies between the exchanges."""
        self._multiply = torch.compile(self._multiply, fullgraph=True, **options)  # type: ignore[method-assign]

    @staticmethod
    def _multiply(
        x_RD: Tensor, choices: Choices, gate_eFD: Tensor, up_eFD: Tensor, down_eDF: Tensor, selective: bool
    ) -> Tensor:
        placing = place(choices.experts_RC, gate_eFD.shape[0], choices.pairs, all_chosen=choices.all_chosen)
        offsets_e = placing.counts.cumsum(0).clamp(max=choices.pairs).int()

        def run(x_RD: Tensor, weights_RC: Tensor, gate_eFD: Tensor, up_eFD: Tensor, down_eDF: Tensor) -> Tensor:
            gate_up_M2F = gate_up_linear(copy_rows(x_RD, placing), gate_eFD, up_eFD, offsets_e)
            weights_M = weights_RC.flatten().index_select(0, placing.choice_M)
            if choices.bounded:  # behind the last pair products leave anything, gradients too
                weights_M = weights_M.where(torch.arange(choices.pairs, device=x_RD.device) < offsets_e[-1:], 0.0)
            hidden_MF = cast(Tensor, WeightedSwiGLU.apply(gate_up_M2F, weights_M))
            y_RD = sum_rows(grouped_linear(hidden_MF, down_eDF, offsets_e), placing)
            return y_RD.masked_fill(placing.counts.sum() > choices.pairs, math.nan) if choices.bounded else y_RD

        inputs = (x_RD, choices.weights_RC, gate_eFD, up_eFD, down_eDF)
        return keeping_matmuls(run, *inputs) if selective else run(*inputs)


class WeightedSwiGLU(torch.autograd.Function):
    """hidden_MF = silu(gate) * up * weight; keeps its inputs only. In fp32, rounded once where compiled."""

    @staticmethod
    def forward(ctx: Any, gate_up_M2F: Tensor, weights_M: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_M2F, weights_M)
        gate_MF, up_MF = gate_up_M2F.chunk(2, dim=1)
        hidden_MF = F.silu(gate_MF.float()) * up_MF.float() * weights_M.unsqueeze(1)
        return hidden_MF.to(gate_up_M2F.dtype)

    @staticmethod
    def backward(ctx: Any, grad_MF: Tensor) -> tuple[Tensor, Tensor]:
        gate_up_M2F, weights_M = ctx.saved_tensors
        gate_MF, up_MF = (half.float() for half in gate_up_M2F.chunk(2, dim=1))
        grad_MF = grad_MF.float()
        silu_MF = F.silu(gate_MF)
        grad_weights_M = (grad_MF * (silu_MF * up_MF)).sum(1)
        grad_MF = grad_MF * weights_M.unsqueeze(1)
        grad_gate_MF = torch.ops.aten.silu_backward(grad_MF * up_MF, gate_MF)
        return torch.cat([grad_gate_MF, grad_MF * silu_MF], dim=1).to(gate_up_M2F.dtype), grad_weights_M


class MoEOutput(NamedTuple):
    x_BSD: Tensor
    aux_loss: Tensor
    tokens_per_expert_E: Tensor


class MoE(nn.Module):
    """x_BSD -> weighted sum of the chosen experts plus the shared experts; in pieces, see pipeline/model/block.py."""

    def __init__(self, config: ModelConfig, aux_loss_weight: float) -> None:
        super().__init__()
        self.router = Router(config, aux_loss_weight)
        self.experts = Experts(config)
        self.shared_experts = MLP(config.hidden_size, config.shared_intermediate_size)

    def forward(self, x_BSD: Tensor, layout: SequenceLayout | None = None) -> MoEOutput:
        """`layout` says which slots are padding; None: none."""
        routing, plan = self.route(x_BSD, layout)
        shared_BSD, routed_ND = self.mix(x_BSD, routing, plan, layout)
        x_BSD = shared_BSD + routed_ND.view_as(shared_BSD)
        return MoEOutput(x_BSD, routing.aux_loss, routing.tokens_per_expert_E)

    def compile(self, **options: Any) -> None:
        """Compile the pieces of `mix`."""
        self._gate_up = torch.compile(self._gate_up, fullgraph=True, **options)  # type: ignore[method-assign]
        self._down = torch.compile(self._down, fullgraph=True, **options)  # type: ignore[method-assign]
        self.experts.compile(**options)

    def route(self, x_BSD: Tensor, layout: SequenceLayout | None = None) -> tuple[Routing, Plan | None]:
        """All that happens on this rank before the rows go to their experts."""
        routing = self.router(x_BSD, None if layout is None else layout.text_BS)
        choices = self._choices(routing, layout)
        return routing, self.experts.dispatcher.plan(choices, routing.tokens_per_expert_E)

    def mix(
        self,
        x_BSD: Tensor,
        routing: Routing,
        plan: Plan | None,
        layout: SequenceLayout | None = None,
        selective: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(output of the shared experts BSD, of the routed ones ND); what needs no rows runs while they travel."""
        journey = self.experts.dispatcher.send(x_BSD.flatten(0, 1), self._choices(routing, layout), plan)
        gate, up = self._gate_up(x_BSD)
        journey.send_back(self.experts(*journey.arrive(), selective))
        shared_BSD = self._down(gate, up, selective)
        return shared_BSD, journey.come_home()

    def _choices(self, routing: Routing, layout: SequenceLayout | None) -> Choices:
        N, K = routing.experts_NK.shape
        padded = layout is not None and layout.text_BS is not None
        tokens = layout.tokens if layout is not None and padded else N
        return Choices(routing.experts_NK, routing.weights_NK, tokens * K, not padded)

    def _gate_up(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        return self.shared_experts.gate_proj(x_BSD), self.shared_experts.up_proj(x_BSD)

    def _down(self, gate: Tensor, up: Tensor, selective: bool) -> Tensor:
        down = self.shared_experts.down
        return keeping_matmuls(down, gate, up) if selective else down(gate, up)
