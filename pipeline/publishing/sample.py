"""Text from a model: token by token, the whole prefix through the network each time.

There is no key-value cache: a sample of T tokens costs T forward passes over at most `max_positions` tokens, which is
seconds for a demonstration and keeps the network free of inference code. For serving, load the published folder with
transformers or vLLM.

Generation starts from [EOS] + prompt, because every training document follows an EOS. Randomness is a
`torch.Generator` on the CPU over float64 probabilities: the same weights and seed give the same text.
"""

from __future__ import annotations

import torch


def generate(
    model: torch.nn.Module,
    prompt: list[int],
    *,
    eos: int,
    max_new_tokens: int,
    max_positions: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[int]:
    """New token ids after the prompt, up to `max_new_tokens`, ending before an EOS. Temperature 0 takes the likeliest."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = [eos, *prompt]
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits_V = model(torch.tensor([ids[-max_positions:]], device=device))[0, -1].double().cpu()
        if temperature > 0:
            token = int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))
        else:
            token = int(logits_V.argmax())
        if token == eos:
            break
        ids.append(token)
    return ids[1 + len(prompt) :]
