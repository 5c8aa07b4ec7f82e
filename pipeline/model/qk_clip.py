"""QK-clip for latent attention (Kimi K2 technical report, section 2.1; threshold 100 there).

After an optimizer step, a head whose largest attention logit S exceeded the threshold has its query and key weights
shrunk by gamma = threshold / S: the nope parts of queries and keys by sqrt(gamma) each, the rotary part of the query
by gamma, because the rotary key is shared by all heads and stays. The head's logits shrink by gamma; values, output
projection and the other heads stay as they are.

Cost: observing adds one extra score product to each observed forward pass (see `attention.largest_logits`), clipping
a multiplication of two weights a layer. Nothing here waits for the device.

Use: `observe_max_logits(model, True)`; after the backward passes of a step `max_logits = take_max_logits(model)`; reduce
with MAX over all ranks that see different data (else replicas drift apart); after the optimizer step `qk_clip_`.
Logits that are not finite clip nothing: such a step is skipped anyway.

Legend: L layers, H heads, P nope width, R rotary width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.model.attention import Attention
from pipeline.model.moonlight import Moonlight
from pipeline.parallel.local import local_part, local_tensor


def observe_max_logits(model: Moonlight, enabled: bool) -> None:
    for attention in _attentions(model):
        attention.observe_max_logits = enabled


def take_max_logits(model: Moonlight) -> Tensor:
    """[L, H] fp32: the largest logit of every head since the last call (-inf: nothing was observed)."""
    attentions = _attentions(model)
    max_logits_LH = torch.stack([attention.max_logits for attention in attentions])
    for attention in attentions:
        attention.max_logits.fill_(-torch.inf)
    return max_logits_LH


@torch.no_grad()
def qk_clip_(model: Moonlight, max_logits_LH: Tensor, threshold: float) -> Tensor:
    """Shrink the heads above the threshold in place (masters or shards of them); returns how many, as a device scalar."""
    if threshold <= 0:
        raise ValueError(f"threshold {threshold} must be positive; 100 is the published value")
    over_LH = (max_logits_LH > threshold) & max_logits_LH.isfinite()
    gamma_LH = torch.where(over_LH, threshold / max_logits_LH, 1.0)
    for attention, gamma_H in zip(_attentions(model), gamma_LH, strict=True):
        root_H1 = gamma_H.sqrt()[:, None]
        nope_HP = root_H1.expand(-1, attention.nope_dim)
        _scale_rows(
            attention.q_proj.weight, torch.cat([nope_HP, gamma_H[:, None].expand(-1, attention.rope_dim)], dim=1)
        )
        _scale_rows(
            attention.kv_b_proj.weight,
            torch.cat([nope_HP, torch.ones_like(root_H1).expand(-1, attention.value_dim)], dim=1),
        )
    return over_LH.sum()


def _scale_rows(weight: Tensor, factor_HX: Tensor) -> None:
    """Multiply the rows of [H * X, in] that are on this rank."""
    local = local_tensor(weight)
    local.mul_(factor_HX.flatten()[local_part(weight)[0], None].to(local))


def _attentions(model: Moonlight) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]
