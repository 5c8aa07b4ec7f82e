"""The mixture-of-experts layer: route, bring tokens to their experts, three products there, bring the sums back, add shared experts.

Routed experts are SwiGLU MLPs held as stacks [E, out, in] and run by grouped matmuls (pipeline/model/expert_products.py),
whatever the loads. A row is copied to its experts' places by a counting sort and their results are summed up again by a gather in
each direction (pipeline/parallel/rows.py): no scatter-add, so results do not depend on the order of atomics. A choice's
weight multiplies the activation between the products, which is narrower than the result, so results need not be kept
for its gradient. The shared experts are one ungated MLP of n_shared x F.

Where experts are spread over ranks the shared experts run while rows travel, gate and up behind the way there, down behind
the way back. In backward all of them runs behind the first exchange, and the gradients of the routed experts' weights
behind the second (pipeline/parallel/flight.py, expert_products.py). With two halves of a micro-batch one half's layer runs there as well
(pipeline/model/interleave.py).

Every row that reaches the experts belongs to one of them. Padding of packed rows stays behind: the number of tokens is
known on the host, its slots name no expert, cost nothing from here on and get only the shared experts' output. An expert
without rows gets a zero gradient.

Legend: N slots, K experts per token, M = tokens*K pairs (after dispatch: R rows and M pairs of this rank's experts), E
experts (e of them here), D hidden, F expert width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.schema import ModelConfig
from pipeline.model.expert_products import Held, expert_products, hold
from pipeline.model.grouped import ALIGNMENT
from pipeline.model.interleave import Paused, in_turn
from pipeline.model.matmul import Linear
from pipeline.model.mlp_products import finish, first
from pipeline.model.router import Router, Routing
from pipeline.model.row_products import Fp8Copies
from pipeline.model.sequences import SequenceLayout
from pipeline.parallel.dispatch import Choices, Dispatcher, LocalDispatch, Plan
from pipeline.parallel.local import local_tensor


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, width)
        self.up_proj = Linear(hidden, width)
        self.down_proj = Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the first two products give; the rest is `finish`."""
        return first(x, self.gate_proj.weight, self.up_proj.weight)

    def finish(self, x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        """The whole MLP to autograd, given what `first` gave."""
        return finish(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight, gate, up)


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
        self.fp8: Fp8Copies | None = None  # where products are in fp8 (training.expert_products)

    def hold(self) -> Held:
        """The weights of a pass, to be called where their gradients shall be computed in backward."""
        return hold(*map(local_tensor, (self.gate_proj, self.up_proj, self.down_proj)))

    def forward(self, x_RD: Tensor, choices: Choices, held: Held | None = None) -> Tensor:
        """y_RD: the weighted sum of each row's experts."""
        return expert_products(x_RD, choices, held or self.hold(), self.fp8)


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

    def route(self, x_BSD: Tensor, layout: SequenceLayout | None = None) -> tuple[Routing, Plan | None]:
        """All that happens on this rank before the rows go to their experts."""
        routing = self.router(x_BSD, None if layout is None else layout.text_BS)
        choices = self._choices(routing, layout)
        return routing, self.experts.dispatcher.plan(choices, routing.tokens_per_expert_E)

    def mix(
        self, x_BSD: Tensor, routing: Routing, plan: Plan | None, layout: SequenceLayout | None = None
    ) -> tuple[Tensor, Tensor]:
        """(output of the shared experts BSD, of the routed ones ND); what needs no rows runs while they travel."""
        return in_turn(self.mixing(x_BSD, routing, plan, layout))[0]

    def mixing(
        self, x_BSD: Tensor, routing: Routing, plan: Plan | None, layout: SequenceLayout | None = None
    ) -> Paused[tuple[Tensor, Tensor]]:
        """`mix`, with a pause at each exchange that is under way."""
        journey = self.experts.dispatcher.send(x_BSD.flatten(0, 1), self._choices(routing, layout), plan)
        yield
        gate, up = self.shared_experts.first(x_BSD)
        held = self.experts.hold()
        journey.send_back(self.experts(*journey.arrive(), held))
        yield
        shared_BSD = self.shared_experts.finish(x_BSD, gate, up)
        return shared_BSD, journey.come_home()

    def _choices(self, routing: Routing, layout: SequenceLayout | None) -> Choices:
        N, K = routing.experts_NK.shape
        padded = layout is not None and layout.text_BS is not None
        tokens = layout.tokens if layout is not None and padded else N
        return Choices(routing.experts_NK, routing.weights_NK, tokens * K, not padded)
