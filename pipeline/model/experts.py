"""The mixture-of-experts layer: route, sort rows by expert, dispatch, three grouped matmuls, combine, add shared experts.

Routed experts are SwiGLU MLPs held as stacks [E, out, in] and run by grouped matmuls (pipeline/model/grouped.py): one
call a projection, whatever the loads. Rows are sorted by expert with a permutation; going and coming back are gathers in both
directions (no scatter-add), so results do not depend on the order of atomics. The shared experts are one ungated MLP
of n_shared x F.

Every row that reaches the experts belongs to one of them. Padding of packed rows stays behind: the number of tokens is
known on the host, so its slots are sorted last and cut off, cost nothing from here on and get only the shared experts'
output. An expert without rows gets a zero gradient.

Legend: N slots, K experts per token, M = tokens*K rows (after dispatch: the rows of this rank's experts), E experts (e of
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
from pipeline.model.sequences import SequenceLayout
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
    order_M: Tensor  # which (slot, choice) each row is
    inverse_NK: Tensor  # the row of each (slot, choice); 0 in padding
    weights_NK: Tensor  # zero in padding
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

    def forward(self, x_BSD: Tensor, layout: SequenceLayout | None = None) -> MoEOutput:
        """`layout` says which slots are padding; None: none."""
        rows = self.sort(x_BSD, layout)
        out_MD = self.experts(rows.x_MD, rows.tokens_per_expert_E)
        return MoEOutput(self.collect(rows, out_MD), rows.aux_loss, rows.tokens_per_expert_E)

    def sort(self, x_BSD: Tensor, layout: SequenceLayout | None = None) -> SortedRows:
        """All that happens on this rank before the rows go to their experts."""
        text_BS = None if layout is None else layout.text_BS
        routing = self.router(x_BSD, text_BS)
        order_M = routing.experts_NK.flatten().argsort(stable=True)
        inverse_NK = inverse_permutation(order_M).view_as(routing.experts_NK)
        text_N1 = None
        if text_BS is not None:
            assert layout is not None
            text_N1 = text_BS.reshape(-1, 1)
            order_M = order_M[: layout.tokens * self.router.top_k]
            inverse_NK = inverse_NK.masked_fill(~text_N1, 0)
        return SortedRows(
            SortRows.apply(x_BSD.flatten(0, 1), order_M, inverse_NK, text_N1),
            order_M,
            inverse_NK,
            routing.weights_NK,
            self.shared_experts(x_BSD),
            routing.aux_loss,
            routing.tokens_per_expert_E,
        )

    def collect(self, rows: SortedRows, out_MD: Tensor) -> Tensor:
        """The experts' results back in the order of slots, weighted and summed, plus the shared experts' -> x_BSD."""
        routed_ND = WeightedSum.apply(out_MD, rows.weights_NK, rows.order_M, rows.inverse_NK)
        return rows.shared_BSD + routed_ND.view_as(rows.shared_BSD)


class SortRows(torch.autograd.Function):
    """rows_MD = x_ND[order // K]: each token once per chosen expert, sorted by expert. Backward gathers and sums over K.

    `text_N1`: False in padding, which is in no row and has no gradient; None: there is none.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_M: Tensor, inverse_NK: Tensor, text_N1: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse_NK, text_N1)
        return x_ND.index_select(0, order_M // inverse_NK.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None, None]:
        inverse_NK, text_N1 = ctx.saved_tensors
        grad_ND = gather_sum(grad_MD, inverse_NK)
        return grad_ND if text_N1 is None else grad_ND.masked_fill_(~text_N1, 0.0), None, None, None


class WeightedSum(torch.autograd.Function):
    """y_ND[n] = sum over k of weights_NK[n, k] * rows_MD[row of (n, k)], products in fp32."""

    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, weights_NK: Tensor, order_M: Tensor, inverse_NK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_MD, weights_NK, order_M)
        return gather_sum(rows_MD, inverse_NK, weights_NK)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows_MD, weights_NK, order_M = ctx.saved_tensors
        grad_MD = grad_ND.index_select(0, order_M // weights_NK.shape[1])
        grad_sorted_M = (rows_MD * grad_MD).sum(-1, dtype=weights_NK.dtype)
        grad_weights_M = torch.zeros_like(weights_NK).flatten().scatter_(0, order_M, grad_sorted_M)
        return grad_MD.mul_(weights_NK.flatten()[order_M].unsqueeze(-1)), grad_weights_M.view_as(weights_NK), None, None


def gather_sum(rows_MD: Tensor, index_NK: Tensor, weights_NK: Tensor | None = None) -> Tensor:
    """y_ND[n] = sum over k of (weights_NK[n, k] *) rows_MD[index_NK[n, k]], summed in fp32 and rounded once.

    PyTorch's embedding bag is this in one pass. On a CPU in fp32 it takes a tenth of the time of a gather, a product
    and a sum, which write and read N * K * D numbers in between; in bf16 it would round the weights.
    """
    N, K = index_NK.shape
    if rows_MD.shape[0] == 0:  # nothing but padding
        return rows_MD.new_zeros(N, rows_MD.shape[1])
    if is_cpu_fp32(rows_MD):
        bags_N = torch.arange(0, N * K, max(K, 1))
        weights_M = None if weights_NK is None else weights_NK.flatten()
        return torch.embedding_bag(rows_MD, index_NK.flatten(), bags_N, False, 0, False, weights_M)[0]
    rows_NKD = rows_MD.index_select(0, index_NK.flatten()).view(N, K, rows_MD.shape[-1])
    if weights_NK is not None:
        rows_NKD = rows_NKD * weights_NK.unsqueeze(-1)
    return rows_NKD.sum(1).to(rows_MD.dtype)
