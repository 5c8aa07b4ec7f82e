"""Attention of new tokens to cached latents and to each other.

A head's key and value of a cached token are W_k c and W_v c, with c its latent and W = [W_k | W_v] the head's rows of
`kv_b_proj`. So there are two orders of multiplication with the same result:

- absorbed: q . (W_k c) = (W_k^T q) . c. The query goes to the latent space, all heads attend to the latents as they are,
  and W_v comes after the sum. Nothing is made for a cached token, but logits and sums are C and not P or V wide.
- expanded: keys and values are made once for each cached row, however many rows continue it.

Few new tokens, as in generation, want the first, and many, as in scoring after a shared prefix, the second.

Legend: B rows, S new tokens (N = B * S, or those of a piece), H heads, P nope, R rope, Q = P + R, V value width, C latent, X = C + R;
U cached rows, T tokens, b rows of a piece.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pipeline.model.cache import CachedPass, LayerCache
from pipeline.model.matmul import linear

CPU_LOGITS = 1 << 20  # numbers held at a time while keys are expanded: they stay in the caches of a core
CUDA_LOGITS = 1 << 26


def attend_cached(
    q_BSHQ: Tensor, weight_kv_b: Tensor, cached: LayerCache, scale: float, nope_dim: int, value_dim: int
) -> Tensor:
    """softmax over the past and, causally, over the pass -> o_BSHV. The queries are turned; `cached.new_BSX` is there."""
    whole, past_UTX, new_BSX = cached.whole, cached.past_UTX, cached.new_BSX
    assert past_UTX is not None
    assert new_BSX is not None
    B, S, H, Q = q_BSHQ.shape
    C = new_BSX.shape[-1] - (Q - nope_dim)
    w_HYC = weight_kv_b.view(H, nope_dim + value_dim, C)  # Y: the rows of W_k, then those of W_v
    if not whole.in_place and not absorbing_is_cheaper(
        B, S, max(whole.starts), len(whole.families), Q, nope_dim, value_dim, C
    ):
        return _by_family(q_BSHQ, past_UTX, new_BSX, whole, scale, partial(_expand, w_HYC=w_HYC, nope_dim=nope_dim))
    q_nope, q_rope = q_BSHQ.flatten(0, 1).split([nope_dim, Q - nope_dim], dim=-1)
    q_HNC = torch.bmm(q_nope.transpose(0, 1), w_HYC[:, :nope_dim])
    q_BSHX = torch.cat([q_HNC.transpose(0, 1), q_rope], dim=-1).view(B, S, H, -1)
    if whole.in_place:
        o_BSHC = _in_place(q_BSHX, past_UTX, new_BSX, whole, scale, C)
    else:
        o_BSHC = _by_family(q_BSHX, past_UTX, new_BSX, whole, scale, partial(_repeat, heads=H, C=C))
    o_HNV = torch.bmm(o_BSHC.flatten(0, 1).transpose(0, 1), w_HYC[:, nope_dim:].transpose(1, 2))
    return o_HNV.transpose(0, 1).reshape(B, S, H, value_dim)


def absorbing_is_cheaper(B: int, S: int, T: int, U: int, Q: int, P: int, V: int, C: int) -> bool:
    """Multiplications a head of both ways; U: cached rows that are continued."""
    expanded = (U * T + B * S) * C * (P + V) + B * S * (T + S) * (Q + V)
    absorbed = B * S * C * (P + V) + B * S * (T + S) * (2 * C + Q - P)
    return absorbed <= expanded


def _in_place(q_BSHX: Tensor, past_UTX: Tensor, new_BSX: Tensor, whole: CachedPass, scale: float, C: int) -> Tensor:
    """New tokens are written into the cache, and all rows attend at once -> o_BSHC."""
    B, S, H, X = q_BSHX.shape
    T = max(whole.starts) + S
    assert past_UTX.shape[1] >= T, f"{T} tokens in a cache with room for {past_UTX.shape[1]}"
    kv_BTX = past_UTX[:, :T]
    kv_BTX[whole.rows_B1, whole.positions_BS] = new_BSX
    logits_BSHT = torch.bmm(q_BSHX.view(B, S * H, X), kv_BTX.transpose(1, 2)).float().mul_(scale).view(B, S, H, T)
    if whole.hidden_BST is not None:
        logits_BSHT += whole.hidden_BST.unsqueeze(2)
    weights_BST = logits_BSHT.softmax(-1).to(kv_BTX.dtype).view(B, S * H, T)
    return torch.bmm(weights_BST, kv_BTX[..., :C]).view(B, S, H, C)


KeysValues = Callable[[Tensor], tuple[Tensor, Tensor]]  # cached numbers [B, T, X] -> k [B, H, T, ...], v [B, H, T, ...]


def _by_family(
    q_BSHQ: Tensor, past_UTX: Tensor, new_BSX: Tensor, whole: CachedPass, scale: float, keys_values: KeysValues
) -> Tensor:
    """One cached row after the other; all rows that continue it multiply with its keys and values together."""
    B, S, H, _ = q_BSHQ.shape
    assert whole.cache is not None
    k_BHSQ, v_BHSV = keys_values(new_BSX)
    o_BSHV = q_BSHQ.new_empty(B, S, H, v_BHSV.shape[-1])
    most = CUDA_LOGITS if q_BSHQ.is_cuda else CPU_LOGITS
    for past, family in whole.families:
        T = whole.cache.lengths[past]
        k_1HTQ, v_1HTV = keys_values(past_UTX[past : past + 1, :T])
        rows_at_once = max(1, most // (H * S * (T + S)))
        queries_at_once = min(S, max(1, most // (H * (T + S))))
        for row in range(family.start, family.stop, rows_at_once):
            rows = slice(row, min(row + rows_at_once, family.stop))
            for query in range(0, S, queries_at_once):
                queries = slice(query, min(query + queries_at_once, S))
                q_HbNQ = (q_BSHQ[rows, queries] * scale).permute(2, 0, 1, 3).contiguous()
                k_HbSQ, v_HbSV = (own[rows, :, : queries.stop].transpose(0, 1) for own in (k_BHSQ, v_BHSV))
                _, b, N, _ = q_HbNQ.shape
                seen_HbNT = torch.bmm(q_HbNQ.flatten(1, 2), k_1HTQ[0].transpose(1, 2)).view(H, b, N, T)
                future_NS = torch.full((N, queries.stop), -torch.inf, device=q_BSHQ.device).triu_(query + 1)
                own_HbNS = (q_HbNQ @ k_HbSQ.transpose(2, 3)).float() + future_NS
                weights = torch.cat([seen_HbNT.float(), own_HbNS], dim=-1).softmax(-1).to(q_BSHQ.dtype)
                seen_HbNT, own_HbNS = weights.split([T, queries.stop], dim=-1)
                o_HbNV = torch.bmm(seen_HbNT.reshape(H, b * N, T), v_1HTV[0]).view(H, b, N, -1) + own_HbNS @ v_HbSV
                o_BSHV[rows, queries] = o_HbNV.permute(1, 2, 0, 3)
    return o_BSHV


def _expand(kv_BTX: Tensor, w_HYC: Tensor, nope_dim: int) -> tuple[Tensor, Tensor]:
    """Each head's own keys [B, H, T, Q] and values [B, H, T, V]."""
    B, T, X = kv_BTX.shape
    H, _, C = w_HYC.shape
    latent_BTC, rope_BTR = kv_BTX.split([C, X - C], dim=-1)
    both_BHTY = linear(latent_BTC.contiguous(), w_HYC.flatten(0, 1)).view(B, T, H, -1).transpose(1, 2)
    k_nope, v_BHTV = both_BHTY.split([nope_dim, both_BHTY.shape[-1] - nope_dim], dim=-1)
    return torch.cat([k_nope, rope_BTR.unsqueeze(1).expand(-1, H, -1, -1)], dim=-1), v_BHTV


def _repeat(kv_BTX: Tensor, heads: int, C: int) -> tuple[Tensor, Tensor]:
    """The cached numbers as every head's keys [B, H, T, X], the latents as its values [B, H, T, C]; nothing is copied."""
    kv_BHTX = kv_BTX.unsqueeze(1).expand(-1, heads, -1, -1)
    return kv_BHTX, kv_BHTX[..., :C]
