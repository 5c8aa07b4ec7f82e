"""Token by token after prompts of different lengths, each pass over the new tokens only (pipeline/model/cache.py).

Legend: B rows that go on, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.model.cache import CachedPass, LatentCache

Tokens = Sequence[int]


class Decoder:
    """Rows of one batch. `first` runs the prompts, `following` one token more of the rows that go on.

    Memory: `kv_lora_rank + qk_rope_head_dim` numbers a layer for each of B x (longest prompt + `room`) tokens.
    `shared`: a cache of one row, whose tokens come before every prompt.
    """

    def __init__(
        self, model: torch.nn.Module, prompts: Sequence[Tokens], *, room: int, shared: LatentCache | None = None
    ) -> None:
        self._model, self._prompts, self._room, self._shared = model, prompts, room, shared
        self._device = next(model.parameters()).device
        self.rows = list(range(len(prompts)))  # those that go on, by number of the prompt
        self._cache: LatentCache

    def first(self) -> torch.Tensor:
        """Logits of what follows each prompt, fp32 [B, V]."""
        lengths = [len(prompt) for prompt in self._prompts]
        width = max(lengths)
        tokens_BS = torch.zeros(len(lengths), width, dtype=torch.int64)
        for row, prompt in enumerate(self._prompts):
            tokens_BS[row, : lengths[row]] = torch.tensor(prompt)
        cached = CachedPass(self._shared, lengths, [0] * len(lengths) if self._shared else None)
        last_B = torch.arange(len(lengths)) * width + torch.tensor(lengths) - 1
        logits_BV = self._run(tokens_BS, last_B, cached)
        self._cache = cached.result(room=self._room)
        return logits_BV

    def following(self, chosen: dict[int, int]) -> torch.Tensor:
        """Logits [B, V] after one token more: `chosen` has it for each row that goes on, in order; the others end."""
        if list(chosen) != self.rows:
            self._cache = self._cache.select([self.rows.index(row) for row in chosen])
            self.rows = list(chosen)
        tokens_B1 = torch.tensor(list(chosen.values())).unsqueeze(1)
        return self._run(tokens_B1, torch.arange(len(chosen)), CachedPass(self._cache, [1] * len(chosen)))

    def _run(self, tokens_BS: torch.Tensor, at_N: torch.Tensor, cached: CachedPass) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self._model(tokens_BS.to(self._device), at_N=at_N.to(self._device), cached=cached)
        return logits
