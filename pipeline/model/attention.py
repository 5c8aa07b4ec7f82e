"""Multi-head latent attention without query compression, as in Moonlight (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Keys and values come from one latent of `kv_lora_rank` numbers a token: kv_a(x) = [latent | rotary key]; the latent is
normalised and expanded by kv_b to per-head [nope key | value], while the rotary key is shared by all heads and not
normalised. A head's query is [nope | rope]; logits are scaled by qk_head_dim^-0.5. Rotary embedding turns neighbouring
pairs (2i, 2i+1): the interleaved convention of the published weights.

Value heads are narrower than query heads. Fused CPU attention and variable-length attention want one width, so values
are padded with zeros there and the padding is cut off the output: exact, and on a CPU 1.6 times faster than the
unfused path. cuDNN and memory-efficient attention take both widths as they are.

Legend: B rows, S tokens, D hidden, H heads, Q query/key width = P nope + R rope, V value width, C latent (kv_lora_rank).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.config.schema import ModelConfig
from pipeline.model import cpu_attention
from pipeline.model.cache import LayerCache
from pipeline.model.cached_attention import attend_cached
from pipeline.model.devices import is_gpu
from pipeline.model.matmul import Linear
from pipeline.model.norm import RMSNorm
from pipeline.model.sequences import SequenceLayout

CUDA_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
LATENT_NORM_EPS = 1e-6  # fixed in the published network; rms_norm_eps rules the other norms only
QUERY_CHUNK = 512  # rows of logits held at a time while their maximum is observed


class Attention(nn.Module):
    """x_BSD -> x_BSD. All projections are without bias."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.nope_dim = config.qk_nope_head_dim
        self.rope_dim = config.qk_rope_head_dim
        self.value_dim = config.v_head_dim
        self.latent_dim = config.kv_lora_rank
        self.scale = config.qk_head_dim**-0.5
        hidden = config.hidden_size
        self.q_proj = Linear(hidden, self.heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(hidden, self.latent_dim + self.rope_dim)
        self.kv_a_layernorm = RMSNorm(self.latent_dim, eps=LATENT_NORM_EPS)
        self.kv_b_proj = Linear(self.latent_dim, self.heads * (self.nope_dim + self.value_dim))
        self.o_proj = Linear(self.heads * self.value_dim, hidden)
        self.observe_max_logits = False  # for QK-clip, pipeline/model/qk_clip.py
        self.max_logits: Tensor  # [H], the largest logit of each head since it was last taken
        self.register_buffer("max_logits", torch.full((self.heads,), -torch.inf), persistent=False)

    def forward(self, x_BSD: Tensor, layout: SequenceLayout, cached: LayerCache | None = None) -> Tensor:
        """`cached`: also attend to the tokens there, and leave there what later passes need of these."""
        B, S, _ = x_BSD.shape
        q_BSHQ = self.q_proj(x_BSD).view(B, S, self.heads, self.nope_dim + self.rope_dim)
        q_nope, q_rope = q_BSHQ.split([self.nope_dim, self.rope_dim], dim=-1)
        latent_BSC, k_rope_BSR = self.kv_a_proj_with_mqa(x_BSD).split([self.latent_dim, self.rope_dim], dim=-1)
        latent_BSC = self.kv_a_layernorm(latent_BSC)
        q_BSHQ = torch.cat([q_nope, rotate_pairs(q_rope, layout)], dim=-1)
        k_rope_BS1R = rotate_pairs(k_rope_BSR.unsqueeze(2), layout)
        if cached is not None:
            cached.new_BSX = torch.cat([latent_BSC, k_rope_BS1R.squeeze(2)], dim=-1)
            if cached.past_UTX is not None:
                o_BSHV = attend_cached(q_BSHQ, self.kv_b_proj.weight, cached, self.scale, self.nope_dim, self.value_dim)
                return self.o_proj(o_BSHV.flatten(2))

        kv_BSHX = self.kv_b_proj(latent_BSC).view(B, S, self.heads, self.nope_dim + self.value_dim)
        k_nope, v_BSHV = kv_BSHX.split([self.nope_dim, self.value_dim], dim=-1)
        k_BSHQ = torch.cat([k_nope, k_rope_BS1R.expand(-1, -1, self.heads, -1)], dim=-1)
        if self.observe_max_logits:  # a maximum, so seeing a batch again in a recomputed block changes nothing
            q, k = q_BSHQ.detach(), k_BSHQ.detach()
            observed_H = largest_logits(q, k, self.scale, layout.mask_B1SS, layout.document_ends, layout.text_BS)
            self.max_logits.copy_(torch.maximum(self.max_logits, observed_H))

        o_BSHV = attend(q_BSHQ, k_BSHQ, v_BSHV, self.scale, layout)
        return self.o_proj(o_BSHV.reshape(B, S, -1))


def rotate_pairs(x_BSHR: Tensor, layout: SequenceLayout) -> Tensor:
    """Turn the pairs (2i, 2i+1) of the last dim by the token's angle.

    The result lists all first members, then all second ones. Queries and keys are laid out alike, so their products
    are those of the interleaved layout.
    """
    cos, sin = layout.cos.unsqueeze(-2), layout.sin.unsqueeze(-2)  # a broadcast dim for heads
    first, second = x_BSHR.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).type_as(x_BSHR)


def attend(q_BSHQ: Tensor, k_BSHQ: Tensor, v_BSHV: Tensor, scale: float, layout: SequenceLayout) -> Tensor:
    """Causal softmax attention inside each sequence or document -> o_BSHV."""
    B, S, H, width = q_BSHQ.shape
    value_width = v_BSHV.shape[-1]
    if layout.document_ends is not None:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (_widen(t, max(width, value_width)).flatten(0, 1) for t in (q_BSHQ, k_BSHQ, v_BSHV))
        ends, longest = layout.document_ends, layout.longest_document
        o = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale, window_size=(-1, 0))
        assert isinstance(o, Tensor)  # a tuple only where auxiliary outputs are asked for
        return o[..., :value_width].view(B, S, H, value_width)
    if is_gpu(q_BSHQ.device):
        with sdpa_kernel(CUDA_BACKENDS, set_priority=True):
            o_BHSV = F.scaled_dot_product_attention(
                q_BSHQ.transpose(1, 2), k_BSHQ.transpose(1, 2), v_BSHV.transpose(1, 2), is_causal=True, scale=scale
            )
        return o_BHSV.transpose(1, 2)
    mask = layout.mask_B1SS
    if S <= cpu_attention.LONGEST and q_BSHQ.dtype == torch.float32:
        q, k, v = (t.transpose(1, 2) for t in (q_BSHQ, k_BSHQ, v_BSHV))
        return cpu_attention.causal_attention(q, k, v, scale, mask).transpose(1, 2)
    q, k, v = (_widen(t, max(width, value_width)).transpose(1, 2) for t in (q_BSHQ, k_BSHQ, v_BSHV))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return o[..., :value_width].transpose(1, 2)


@torch.library.custom_op("moonlight::largest_logits", mutates_args=())
def largest_logits(
    q_BSHQ: Tensor,
    k_BSHQ: Tensor,
    scale: float,
    mask_B1SS: Tensor | None,
    document_ends: Tensor | None,
    text_BS: Tensor | None = None,
) -> Tensor:
    """The largest scaled attention logit of each head over all pairs of text that may attend, fp32 [H].

    A side computation: 2*H*Q*S^2 FLOPs a sequence (the score half of a non-causal forward pass; about a sixth of what
    attention costs forward and backward) and B*H*QUERY_CHUNK*S numbers of memory. One operator, so that selective
    checkpointing keeps its H numbers rather than the logits, which are products, and does not compute them again.
    """
    B, S, H, _ = q_BSHQ.shape
    k_BHQS = k_BSHQ.permute(0, 2, 3, 1)
    document_B1S = None if document_ends is None else _documents(document_ends, B, S)
    columns = torch.arange(S, device=q_BSHQ.device)
    largest = torch.full((H,), -torch.inf, device=q_BSHQ.device)
    for start in range(0, S, QUERY_CHUNK):
        rows = columns[start : start + QUERY_CHUNK, None]
        allowed = (columns <= rows)[None, None]
        if mask_B1SS is not None:
            allowed = mask_B1SS[:, :, start : start + QUERY_CHUNK]
        elif document_B1S is not None:
            allowed = allowed & (document_B1S[:, :, start : start + QUERY_CHUNK, None] == document_B1S[:, :, None])
        if text_BS is not None:  # text sees no padding: keys need no mask of their own
            allowed = allowed & text_BS[:, None, start : start + QUERY_CHUNK, None]
        logits_BHTS = (q_BSHQ[:, start : start + QUERY_CHUNK].transpose(1, 2) @ k_BHQS).float() * scale
        largest = torch.maximum(largest, logits_BHTS.masked_fill(~allowed, -torch.inf).amax((0, 2, 3)))
    return largest


@largest_logits.register_fake
def _(
    q_BSHQ: Tensor,
    k_BSHQ: Tensor,
    scale: float,
    mask_B1SS: Tensor | None,
    document_ends: Tensor | None,
    text_BS: Tensor | None = None,
) -> Tensor:
    return q_BSHQ.new_empty(q_BSHQ.shape[2], dtype=torch.float32)


def _documents(document_ends: Tensor, B: int, S: int) -> Tensor:
    """The document number of every token, [B, 1, S]."""
    tokens = torch.arange(B * S, device=document_ends.device)
    return torch.searchsorted(document_ends, tokens, right=True).view(B, 1, S)


def _widen(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
