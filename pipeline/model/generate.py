"""Greedy text generation: the whole prefix is run again for every token (no key/value cache), S^2 cost, samples only."""

from __future__ import annotations

import torch

from pipeline.model.moonlight import Moonlight


@torch.no_grad()
def generate(model: Moonlight, ids: list[int], max_new_tokens: int, eos_id: int | None = None) -> list[int]:
    """`ids` followed by the most likely continuation, up to the end token (included), `max_new_tokens` or the model's length."""
    if not ids:
        raise ValueError(
            "ids: an empty prompt has no next token; give at least one token, for example the end-of-text id"
        )
    device = next(model.parameters()).device
    limit = min(len(ids) + max_new_tokens, model.config.max_position_embeddings)
    training, result = model.training, list(ids)
    model.eval()
    while len(result) < limit:
        logits_BSV = model(torch.tensor([result], device=device))
        result.append(int(logits_BSV[0, -1].argmax()))
        if result[-1] == eos_id:
            break
    model.train(training)
    return result
