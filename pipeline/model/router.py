"""Sigmoid router with a selection bias (DeepSeek-V3, arXiv 2412.19437, section 2.1.2, as Moonlight uses it).

Scores are s = sigmoid(W x), the product and all after it in fp32, W and x in the dtype that they have. The top k of s + b choose the experts; b is the selection bias. What an expert
weighs comes from the *unbiased* scores of the chosen: w = factor * s / (sum of chosen s + 1e-20). So the bias moves
load between experts and never touches the output of a given choice. No gradient reaches it: once per optimizer step
`update_router_bias` moves it by the rate u against the sign of each expert's excess load, mean-centred so that the sum
of the biases, hence their size, cannot drift (MoonshotAI/Moonlight issue 21).

A small sequence-wise loss keeps single sequences balanced (the same paper, equations 17-20):
    alpha * mean over sequences of  sum_e f_e P_e,   f_e = E / (k S) * (tokens of the sequence routed to e),
    P_e = mean over the sequence of s_e / sum_j s_j.
f counts the experts that were really chosen, bias included.

Padding is not routed: its slots are in no count and in no mean, S is the text of the sequence, and a row without text is
no sequence.

Legend: N slots = B rows x S, D hidden, E experts, K chosen per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.config.schema import ModelConfig
from pipeline.model.matmul import fp32_linear


class Routing(NamedTuple):
    experts_NK: Tensor  # int64; in padding E, which no expert is
    weights_NK: Tensor  # fp32, sums to the routed scaling factor where normalised; zero in padding
    tokens_per_expert_E: Tensor  # int64
    aux_loss: Tensor  # fp32 scalar, already weighted


class Router(nn.Module):
    def __init__(self, config: ModelConfig, aux_loss_weight: float) -> None:
        super().__init__()
        experts = config.n_routed_experts
        self.top_k = config.num_experts_per_tok
        self.normalise = config.norm_topk_prob
        self.factor = config.routed_scaling_factor
        self.aux_loss_weight = aux_loss_weight
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        self.e_score_correction_bias: Tensor
        self.tokens_per_expert: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(experts, dtype=torch.float32))
        # Summed by Moonlight.forward over the micro-batches of a step; outside the blocks, so that a block recomputed
        # under activation checkpointing does not count its tokens twice.
        self.register_buffer("tokens_per_expert", torch.zeros(experts, dtype=torch.int64), persistent=False)

    def forward(self, x_BSD: Tensor, text_BS: Tensor | None = None) -> Routing:
        """`text_BS`: True where a slot holds text; None: everywhere."""
        B, S, D = x_BSD.shape
        E = self.weight.shape[0]
        scores_NE = fp32_linear(x_BSD.reshape(-1, D), self.weight).sigmoid()
        experts_NK = (scores_NE.detach() + self.e_score_correction_bias).topk(self.top_k, dim=-1, sorted=False).indices
        chosen_NK = scores_NE.gather(1, experts_NK)
        if self.normalise:
            chosen_NK = chosen_NK / (chosen_NK.sum(-1, keepdim=True) + 1e-20)
        weights_NK = chosen_NK * self.factor
        text_N1 = None if text_BS is None else text_BS.reshape(-1, 1)
        counted_NK = torch.ones_like(experts_NK) if text_N1 is None else text_N1.expand_as(experts_NK).long()
        counts_BE = torch.zeros(B, E, dtype=torch.int64, device=x_BSD.device)
        counts_BE.scatter_add_(1, experts_NK.view(B, -1), counted_NK.view(B, -1))
        if text_N1 is not None:
            experts_NK = experts_NK.masked_fill(~text_N1, E)
            weights_NK = weights_NK.masked_fill(~text_N1, 0.0)
        aux_loss = scores_NE.new_zeros(())
        if self.aux_loss_weight > 0:
            share_BSE = (scores_NE / scores_NE.sum(-1, keepdim=True)).view(B, S, E)
            aux_loss = self.aux_loss_weight * self._balance(counts_BE, share_BSE, text_BS)
        return Routing(experts_NK, weights_NK, counts_BE.sum(0), aux_loss)

    def _balance(self, counts_BE: Tensor, share_BSE: Tensor, text_BS: Tensor | None) -> Tensor:
        """Mean over sequences of sum_e f_e P_e."""
        _, S, E = share_BSE.shape
        if text_BS is None:
            return (counts_BE * (E / (self.top_k * S)) * share_BSE.mean(1)).sum(-1).mean()
        length_B1 = text_BS.sum(1, keepdim=True)
        at_least_one_B1 = length_B1.clamp(min=1)
        load_BE = counts_BE * (E / self.top_k) / at_least_one_B1
        share_BE = share_BSE.masked_fill(~text_BS.unsqueeze(-1), 0.0).sum(1) / at_least_one_B1
        return (load_BE * share_BE).sum() / (length_B1 > 0).sum().clamp(min=1)


@torch.no_grad()
def update_router_bias(model: nn.Module, counts_per_layer: Mapping[str, Tensor], rate: float | Tensor) -> None:
    """b += rate * (sign(mean load - load) - mean of those signs), once per optimizer step.

    `counts_per_layer` maps the name of a router (`layers.3.mlp.router`) to its tokens per expert of the whole step,
    already summed over ranks and micro-batches. A layer that saw no token keeps its bias.
    """
    for name, counts_E in counts_per_layer.items():
        bias_E = model.get_buffer(f"{name}.e_score_correction_bias")
        load_E = counts_E.to(bias_E)
        direction_E = (load_E.mean() - load_E).sign()
        bias_E += rate * (direction_E - direction_E.mean())
