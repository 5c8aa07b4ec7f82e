"""The mixture-of-experts layer: route, sort rows by expert, dispatch, three grouped matmuls, combine, add shared experts.

Routed experts are SwiGLU MLPs held as stacks [E, out, in] and run by grouped matmuls (pipeline/model/grouped.py): one
call a projection, whatever the loads. Rows are sorted by expert with a permutation; going and coming back are gathers in both
directions (no scatter-add), so results do not depend on the order of atomics. The shared experts are one ungated MLP
of n_shared x F.

Every row that reaches the experts belongs to one of them; no padding rows exist. An expert without rows gets a zero
gradient.

Legend: N tokens, K experts per token, M = N*K rows (after dispatch: the rows of this rank's experts), E experts (e of
them here), D hidden, F expert width.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.schema import ModelConfig
from pipeline.model.grouped import ALIGNMENT, grouped_linear
from pipeline.model.matmul import Linear, is_cpu_fp32
from pipeline.model.recomputation import keeping_matmuls
from pipeline.model.router import Router
from pipeline.parallel.dispatch import LocalDispatch, inverse_permutation
from pipeline.parallel.local import local_tensor


class Dispatcher(Protocol):
    """Brings rows to the ranks that hold their experts and back (pipeline/parallel/dispatch.py)."""

    def dispatch(self, x_MD: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Rows sorted by expert -> rows grouped by local expert, tokens per local expert, a handle for the way back."""

    def combine(self, x_MD: Tensor, handle: Any) -> Tensor:
        """Rows grouped by local expert -> the sorted rows that `dispatch` was given."""


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, width)
        self.up_proj = Linear(hidden, width)
        self.down_proj = Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


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

    def forward(self, x_MD: Tensor, counts_E: Tensor, selective: bool = False) -> Tensor:
        """Rows sorted by expert -> the same rows through their experts. `selective`: compute activations again in backward."""
        rows_MD, counts_e, handle = self.dispatcher.dispatch(x_MD, counts_E)
        gate_eFD, up_eFD, down_eDF = map(local_tensor, (self.gate_proj, self.up_proj, self.down_proj))
        out_MD = self._multiply(rows_MD, counts_e, gate_eFD, up_eFD, down_eDF, selective)
        return self.dispatcher.combine(out_MD, handle)

    def compile(self, **options: Any) -> None:
        """Compile what lies between the exchanges."""
        self._multiply = torch.compile(self._multiply, fullgraph=True, **options)  # type: ignore[method-assign]

    @staticmethod
    def _multiply(
        x_MD: Tensor, counts_e: Tensor, gate_eFD: Tensor, up_eFD: Tensor, down_eDF: Tensor, selective: bool
    ) -> Tensor:
        def run(x_MD: Tensor, gate_eFD: Tensor, up_eFD: Tensor, down_eDF: Tensor) -> Tensor:
            gate_MF = grouped_linear(x_MD, gate_eFD, offsets_e)
            up_MF = grouped_linear(x_MD, up_eFD, offsets_e)
            return grouped_linear(F.silu(gate_MF) * up_MF, down_eDF, offsets_e)

        offsets_e = counts_e.cumsum(0).int()
        inputs = (x_MD, gate_eFD, up_eFD, down_eDF)
        return keeping_matmuls(run, *inputs) if selective else run(*inputs)


class SortedRows(NamedTuple):
    """What the experts get, and what is needed to put their results back."""

    x_MD: Tensor  # the tokens, once per chosen expert, sorted by expert
    order_M: Tensor  # which (token, choice) each row is
    inverse_M: Tensor  # where each (token, choice) went
    weights_NK: Tensor
    shared_BSD: Tensor  # output of the shared experts
    aux_loss: Tensor
    tokens_per_expert_E: Tensor


class MoEOutput(NamedTuple):
    x_BSD: Tensor
    aux_loss: Tensor
    tokens_per_expert_E: Tensor


class MoE(nn.Module):
    """x_BSD -> sum of the chosen experts, weighted, plus the shared experts; in three pieces, see pipeline/model/block.py."""

    def __init__(self, config: ModelConfig, aux_loss_weight: float) -> None:
        super().__init__()
        self.router = Router(config, aux_loss_weight)
        self.experts = Experts(config)
        self.shared_experts = MLP(config.hidden_size, config.shared_intermediate_size)

    def forward(self, x_BSD: Tensor) -> MoEOutput:
        rows = self.sort(x_BSD)
        out_MD = self.experts(rows.x_MD, rows.tokens_per_expert_E)
        return MoEOutput(self.collect(rows, out_MD), rows.aux_loss, rows.tokens_per_expert_E)

    def sort(self, x_BSD: Tensor) -> SortedRows:
        """All that happens on this rank before the rows go to their experts."""
        routing = self.router(x_BSD)
        order_M = routing.experts_NK.flatten().argsort(stable=True)
        inverse_M = inverse_permutation(order_M)
        return SortedRows(
            SortRows.apply(x_BSD.flatten(0, 1), order_M, inverse_M),
            order_M,
            inverse_M,
            routing.weights_NK,
            self.shared_experts(x_BSD),
            routing.aux_loss,
            routing.tokens_per_expert_E,
        )

    def collect(self, rows: SortedRows, out_MD: Tensor) -> Tensor:
        """The experts' results back in the order of tokens, weighted and summed, plus the shared experts' -> x_BSD."""
        routed_ND = WeightedSum.apply(out_MD, rows.weights_NK, rows.order_M, rows.inverse_M)
        return rows.shared_BSD + routed_ND.view_as(rows.shared_BSD)


class SortRows(torch.autograd.Function):
    """rows_MD = x_ND[order // K]: each token once per chosen expert, sorted by expert. Backward gathers and sums over K."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_M: Tensor, inverse_M: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_M)
        ctx.tokens = x_ND.shape[0]
        K = order_M.numel() // max(x_ND.shape[0], 1)
        return x_ND.index_select(0, order_M // max(K, 1))

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_M,) = ctx.saved_tensors
        K = inverse_M.numel() // max(ctx.tokens, 1)
        return gather_sum(grad_MD, inverse_M.view(ctx.tokens, K)), None, None


class WeightedSum(torch.autograd.Function):
    """y_ND[n] = sum over k of weights_NK[n, k] * rows_MD[row of (n, k)], products in fp32."""

    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, weights_NK: Tensor, order_M: Tensor, inverse_M: Tensor) -> Tensor:
        ctx.save_for_backward(rows_MD, weights_NK, order_M)
        return gather_sum(rows_MD, inverse_M.view_as(weights_NK), weights_NK)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows_MD, weights_NK, order_M = ctx.saved_tensors
        grad_MD = grad_ND.index_select(0, order_M // weights_NK.shape[1])
        grad_sorted_M = (rows_MD * grad_MD).sum(-1, dtype=weights_NK.dtype)
        grad_weights_M = torch.empty_like(grad_sorted_M).scatter_(0, order_M, grad_sorted_M)
        return grad_MD.mul_(weights_NK.flatten()[order_M].unsqueeze(-1)), grad_weights_M.view_as(weights_NK), None, None


def gather_sum(rows_MD: Tensor, index_NK: Tensor, weights_NK: Tensor | None = None) -> Tensor:
    """y_ND[n] = sum over k of (weights_NK[n, k] *) rows_MD[index_NK[n, k]], summed in fp32 and rounded once.

    PyTorch's embedding bag is this in one pass. On a CPU in fp32 it takes a tenth of the time of a gather, a product
    and a sum, which write and read N * K * D numbers in between; in bf16 it would round the weights.
    """
    N, K = index_NK.shape
    if is_cpu_fp32(rows_MD):
        bags_N = torch.arange(0, N * K, max(K, 1))
        weights_M = None if weights_NK is None else weights_NK.flatten()
        return torch.embedding_bag(rows_MD, index_NK.flatten(), bags_N, False, 0, False, weights_M)[0]
    rows_NKD = rows_MD.index_select(0, index_NK.flatten()).view(N, K, rows_MD.shape[-1])
    if weights_NK is not None:
        rows_NKD = rows_NKD * weights_NK.unsqueeze(-1)
    return rows_NKD.sum(1).to(rows_MD.dtype)
