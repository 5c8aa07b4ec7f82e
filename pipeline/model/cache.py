"""The latent key-value cache of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

What attention needs of a token that the network has seen is its normalised latent and its turned rotary key:
`kv_lora_rank + qk_rope_head_dim` numbers a layer, whatever the number of heads (Moonlight: 576 instead of 5,120).
Keys and values of the heads follow from them by `kv_b_proj`; pipeline/model/cached_attention.py says when they are made.

A forward pass is given a `CachedPass`: which cached row each of its own rows continues, and where its tokens end. Rows may
continue the same cached row (answers to one question), and rows of a pass may have different lengths: tokens stand on
the left, padding on the right, and what padding leaves in a cache is never looked at.

    first = CachedPass(None, lengths)                       # nothing is cached yet
    model(prompts_BS, at_N=..., cached=first)
    cache = first.result(room=200)                          # a cache of those rows, with room for more tokens
    model(next_B1, at_N=..., cached=CachedPass(cache, [1] * B))      # grows in place

Plain classes, not dataclasses: where FSDP casts what a module is given, it makes dataclasses anew
(findings/fsdp2_casts_dataclass_inputs.sh), and what a layer leaves in a copy is lost.

Legend: L layers, U cached rows, B rows of a pass, S tokens of its longest row, T tokens seen, X = C latent + R rotary key.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from pipeline.model.sequences import SequenceLayout, rotary_tables


class LatentCache:
    """Tokens that the network has seen, by row. `layers`: L tensors [U, room, X]; `lengths`: tokens of each row."""

    def __init__(self, layers: list[Tensor], lengths: list[int]) -> None:
        self.layers, self.lengths = layers, lengths

    @property
    def room(self) -> int:
        """Tokens that a row can hold."""
        return self.layers[0].shape[1]

    def select(self, rows: Sequence[int]) -> LatentCache:
        """A copy of some rows, in this order; a row may be taken more than once."""
        index = torch.tensor(list(rows), device=self.layers[0].device)
        return LatentCache([kv.index_select(0, index) for kv in self.layers], [self.lengths[row] for row in rows])


class LayerCache:
    """One layer's part of a pass: `past_UTX` is what it continues, `new_BSX` what attention leaves here."""

    def __init__(self, whole: CachedPass, past_UTX: Tensor | None) -> None:
        self.whole, self.past_UTX = whole, past_UTX
        self.new_BSX: Tensor | None = None


class CachedPass:
    """One forward pass over rows that continue cached ones.

    `lengths`: tokens of each row of the pass, without padding. `continues`: the cached row of each; those of one cached
    row stand together. None: row b continues row b, and the cache is grown in place if it has the room.
    """

    def __init__(
        self, cache: LatentCache | None, lengths: Sequence[int], continues: Sequence[int] | None = None
    ) -> None:
        self.cache, self.lengths = cache, list(lengths)
        self.in_place = cache is not None and continues is None
        self.continues = list(continues if continues is not None else range(len(self.lengths)))
        self.starts = [0 if cache is None else cache.lengths[row] for row in self.continues]
        self._layers: list[LayerCache] = []

    def layer(self, index: int) -> LayerCache:
        """To be asked for in the order of layers."""
        assert index == len(self._layers)
        self._layers.append(LayerCache(self, None if self.cache is None else self.cache.layers[index]))
        return self._layers[-1]

    def layout(self, S: int, rope_dim: int, rope_theta: float, device: torch.device) -> SequenceLayout:
        """Before the layers: where each token of a row of S slots stands (padding goes on counting), and which hold text.

        Kept for the layers: `positions_BS`, `rows_B1` and `hidden_BST`, which is -inf where a token
        may not look at one of its row's first T = longest start + S tokens, else 0; None where every token sees all."""
        self.positions_BS = torch.tensor(self.starts, device=device)[:, None] + torch.arange(S, device=device)
        self.rows_B1 = torch.arange(len(self.starts), device=device)[:, None]
        self.hidden_BST: Tensor | None = None
        if self.in_place and (S > 1 or len(set(self.starts)) > 1):
            future_BST = torch.arange(max(self.starts) + S, device=device) > self.positions_BS.unsqueeze(-1)
            self.hidden_BST = torch.zeros(future_BST.shape, device=device).masked_fill_(future_BST, -torch.inf)
        text_BS = None
        if sum(self.lengths) < len(self.lengths) * S:
            text_BS = torch.arange(S, device=device) < torch.tensor(self.lengths, device=device)[:, None]
        cos, sin = rotary_tables(self.positions_BS, rope_dim, rope_theta)
        return SequenceLayout(cos, sin, text_BS=text_BS, tokens=sum(self.lengths))

    @cached_property
    def families(self) -> list[tuple[int, slice]]:
        """(cached row, the rows that continue it)."""
        found: list[tuple[int, slice]] = []
        for row, past in enumerate(self.continues):
            if found and found[-1][0] == past:
                found[-1] = (past, slice(found[-1][1].start, row + 1))
            else:
                found.append((past, slice(row, row + 1)))
        assert len({past for past, _ in found}) == len(found), "rows that continue the same cached row stand together"
        return found

    def result(self, rows: Sequence[int] | None = None, room: int = 0) -> LatentCache:
        """Cached rows and what the pass added to them: of all rows, or of some; `room` for so many tokens more."""
        rows = range(len(self.lengths)) if rows is None else rows
        lengths = [self.starts[row] + self.lengths[row] for row in rows]
        layers = []
        for layer in self._layers:
            new_BSX = layer.new_BSX
            assert new_BSX is not None
            kv = new_BSX.new_zeros(len(lengths), max(lengths) + room, new_BSX.shape[-1])
            for place, row in enumerate(rows):
                start, end = self.starts[row], lengths[place]
                if layer.past_UTX is not None:
                    kv[place, :start] = layer.past_UTX[self.continues[row], :start]
                kv[place, start:end] = new_BSX[row, : end - start]
            layers.append(kv)
        return LatentCache(layers, lengths)

    def finish(self) -> None:
        """After a pass in place: the cache holds its tokens."""
        if self.in_place:
            assert self.cache is not None
            self.cache.lengths = [start + new for start, new in zip(self.starts, self.lengths)]
