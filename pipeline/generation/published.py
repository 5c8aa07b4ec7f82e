"""A published folder, or any other of this network in the format of Hugging Face, ready to go on with texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pipeline.config.schema import StorageConfig
from pipeline.generation.sample import Sampling, generate
from pipeline.model.hf import load_hf, read_config
from pipeline.model.moonlight import Moonlight
from pipeline.storage import Storage
from pipeline.tokenizer import Encoder


@dataclass(frozen=True)
class Published:
    model: Moonlight
    encoder: Encoder

    def continuations(
        self,
        prompts: Sequence[str],
        sampling: Sequence[Sampling],
        max_new_tokens: int,
        told: Callable[[int, str], None] = lambda row, text: None,
    ) -> list[str]:
        """The text after each prompt. `told` hears pieces of it as they come: whole characters, with the prompt's number."""
        tokens: list[list[int]] = [[] for _ in prompts]
        said = [""] * len(prompts)

        def hear(row: int, token: int) -> None:
            tokens[row].append(token)
            text = self.encoder.decode(tokens[row])
            if not text.endswith("\ufffd"):  # a character that is not complete yet
                told(row, text[len(said[row]) :])
                said[row] = text

        found = generate(
            self.model,
            [self.encoder.encode([prompt.encode()])[0].tolist() for prompt in prompts],
            sampling,
            eos=self.encoder.eos_id,
            max_new_tokens=max_new_tokens,
            max_positions=self.model.config.max_position_embeddings,
            told=hear,
        )
        texts = [self.encoder.decode(new) for new in found]
        for row, text in enumerate(texts):
            if len(text) > len(said[row]):
                told(row, text[len(said[row]) :])
        return texts


def load_published(folder: str, *, endpoint_url: str | None = None) -> Published:
    """From a local folder or an s3:// URI; on CUDA where there is one, in fp32. Raises ValueError naming what is wrong there."""
    storage = Storage(StorageConfig(root=folder, endpoint_url=endpoint_url))
    config = read_config("", storage)
    with torch.device("meta"):
        model = Moonlight(config)
    model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    load_hf(model, "", storage)
    return Published(model.eval().requires_grad_(False), Encoder.load("", storage))
