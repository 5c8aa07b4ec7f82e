"""Attention against transformers' and against plain softmax formulas."""

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
)

from pipeline.model.attention import attend, largest_logits, rotate_pairs
from pipeline.model.sequences import rotary_tables, sequence_layout

CPU = torch.device("cpu")


def layout_of(B, S, documents=None, rope_dim=8):
    return sequence_layout(B, S, documents, rope_dim=rope_dim, rope_theta=5e4, device=CPU)


def draws(B=2, S=12, H=3, Q=10, V=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(B, S, H, width, generator=generator, requires_grad=True) for width in (Q, Q, V))


def reference(q, k, v, scale, allowed_BSS):
    """softmax(q k^T scale) v with masked pairs left out, one head after the other, in fp64."""
    logits = torch.einsum("bshq,bthq->bhst", q.double(), k.double()) * scale
    weights = logits.masked_fill(~allowed_BSS[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhst,bthv->bshv", weights, v.double())


def causal(B, S):
    return torch.ones(S, S, dtype=torch.bool).tril().expand(B, S, S)


@pytest.mark.parametrize("V", [6, 10, 14])
def test_attention_is_causal_softmax_for_any_value_width(V):
    q, k, v = draws(V=V)
    out = attend(q, k, v, 0.3, layout_of(2, 12))
    expected = reference(q, k, v, 0.3, causal(2, 12))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(out.square().sum(), (q, k, v))
    theirs = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_documents_are_a_block_diagonal_mask():
    q, k, v = draws()
    documents = [[5, 3], [2, 2, 8]]  # four tokens of padding in the first row
    allowed = torch.zeros(2, 12, 12, dtype=torch.bool)
    for row, lengths in enumerate([[5, 3, 4], [2, 2, 8]]):
        start = 0
        for n in lengths:
            allowed[row, start : start + n, start : start + n] = torch.ones(n, n, dtype=torch.bool).tril()
            start += n
    layout = layout_of(2, 12, documents)
    assert torch.equal(layout.mask_B1SS[:, 0], allowed)
    torch.testing.assert_close(
        attend(q, k, v, 0.3, layout).double(), reference(q, k, v, 0.3, allowed), rtol=1e-5, atol=1e-6
    )


def test_positions_restart_at_each_document():
    layout = layout_of(1, 12, [[5, 3]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    cos, sin = rotary_tables(positions, 8, 5e4)
    assert torch.equal(layout.cos, cos)
    assert torch.equal(layout.sin, sin)


def test_one_document_a_row_is_the_plain_case():
    layout = layout_of(2, 12, [[12], [12]])
    assert layout.mask_B1SS is None
    assert layout.cos.shape == (12, 4)


def test_rotation_gives_the_products_of_transformers_interleaved_embedding():
    """The order of the turned numbers may differ, query-key products may not."""
    q, k, _ = draws(Q=8)
    layout = layout_of(2, 12)
    cos, sin = (table.repeat(1, 2)[None] for table in (layout.cos, layout.sin))
    their_q, their_k = apply_rotary_pos_emb_interleave(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    ours = torch.einsum("bshr,bthr->bhst", rotate_pairs(q, layout), rotate_pairs(k, layout))
    torch.testing.assert_close(ours, their_q @ their_k.transpose(-2, -1), rtol=1e-5, atol=1e-5)
    half_q, half_k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)  # the other convention
    assert (ours - half_q @ half_k.transpose(-2, -1)).abs().max() > 0.1


def test_rotation_is_relative():
    """A pair turned to positions p and p + 3 has the product it has at 0 and 3."""
    q, k, _ = draws(B=1, S=1, H=1, Q=8)
    cos, sin = rotary_tables(torch.arange(12), 8, 5e4)
    layout = layout_of(1, 12)
    rows_q, rows_k = (rotate_pairs(x.expand(1, 12, 1, 8), layout)[0, :, 0] for x in (q, k))
    products = (rows_q[3:] * rows_k[:-3]).sum(-1)
    torch.testing.assert_close(products, products[0].expand_as(products), rtol=1e-4, atol=1e-5)
    assert cos.dtype == sin.dtype == torch.float32


@pytest.mark.parametrize("documents", [None, [[5, 3], [2, 2, 8]]])
def test_largest_logits_are_those_of_pairs_that_attend(documents, monkeypatch):
    monkeypatch.setattr("pipeline.model.attention.QUERY_CHUNK", 5)
    q, k, _ = draws()
    layout = layout_of(2, 12, documents)
    allowed = causal(2, 12) if documents is None else layout.mask_B1SS[:, 0]
    logits = torch.einsum("bshq,bthq->bhst", q, k) * 0.3
    expected = logits.masked_fill(~allowed[:, None], -torch.inf).amax((0, 2, 3))
    torch.testing.assert_close(largest_logits(q, k, 0.3, layout.mask_B1SS, layout.document_ends), expected)
