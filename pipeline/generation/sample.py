"""Text after prompts: the likeliest, or drawn at a temperature from the likeliest tokens.

Prompts begin with an EOS, because every training document follows one. A text that reaches the last position goes on from
its last `max_positions // 2` tokens, so that it may be of any length and costs two passes more a window.

Every row draws from a `torch.Generator` of its own on the CPU, over float64 probabilities: with the same weights, prompt
and seed the same text, whatever stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pipeline.generation.decode import Decoder, Tokens


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 takes the likeliest token; `top_p` draws from the fewest tokens that have this probability together.

    Raises ValueError for values that mean nothing."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature}: give a number from 0 (the likeliest token) on")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: give a probability over 0 and up to 1 (every token)")

    def choose(self, logits_V: torch.Tensor, generator: torch.Generator) -> int:
        """The next token. Raises ValueError where the network gives no numbers."""
        if not bool(logits_V.isfinite().all()):
            raise ValueError("the network's logits are not finite numbers; take an earlier checkpoint")
        if self.temperature == 0:
            return int(logits_V.argmax())
        p_V = (logits_V.double().cpu() / self.temperature).softmax(-1)
        if self.top_p < 1:
            sorted_V, order_V = p_V.sort(descending=True, stable=True)
            before_V = sorted_V.cumsum(-1) - sorted_V  # a token stays while those before it are too few
            p_V = torch.zeros_like(p_V).scatter(0, order_V, sorted_V.masked_fill(before_V >= self.top_p, 0.0))
        return int(torch.multinomial(p_V, 1, generator=generator))


def generate(
    model: torch.nn.Module,
    prompts: Sequence[Tokens],
    sampling: Sequence[Sampling],
    *,
    eos: int,
    max_new_tokens: int,
    max_positions: int,
    stop: frozenset[int] = frozenset(),
    told: Callable[[int, int], None] = lambda row, token: None,
) -> list[list[int]]:
    """New token ids after each prompt, at most so many, ending before an EOS or a token of `stop`. `sampling`: one for each prompt.

    `told` hears of every token as it comes, with the number of its prompt.
    """
    assert max_positions > 1
    texts = [[eos, *prompt] for prompt in prompts]
    starts = [len(text) for text in texts]
    generators = [torch.Generator().manual_seed(each.seed) for each in sampling]
    going = list(range(len(prompts))) if max_new_tokens > 0 else []
    while going:
        windows = [
            texts[row] if len(texts[row]) < max_positions else texts[row][-(max_positions // 2) :] for row in going
        ]
        room = min(max_positions - max(map(len, windows)), max_new_tokens)
        decoder, numbers = Decoder(model, windows, room=room), going
        logits_BV = decoder.first()
        for _ in range(room):
            chosen: dict[int, int] = {}
            for place, logits_V in zip(decoder.rows, logits_BV):
                row = numbers[place]
                token = sampling[row].choose(logits_V, generators[row])
                if token == eos or token in stop:
                    continue
                texts[row].append(token)
                told(row, token)
                if len(texts[row]) - starts[row] < max_new_tokens:
                    chosen[place] = token
            going = [numbers[place] for place in chosen]
            if not going:
                break
            logits_BV = decoder.following(chosen)
    return [text[start:] for text, start in zip(texts, starts)]
