"""A published folder, or any other of this network in the format of Hugging Face, ready to go on with texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from pipeline.config.schema import StorageConfig
from pipeline.generation.sample import Sampling, generate
from pipeline.integrity import DamagedFile, read_checked
from pipeline.manifest import FileEntry
from pipeline.model.hf import load_hf, read_config
from pipeline.model.moonlight import Moonlight
from pipeline.storage import Storage
from pipeline.tokenizer import Encoder
from pipeline.training.initial import manifest_in

SMALL = (".json", ".jinja", ".model")  # network and tokenizer


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
        hearers = [pieces(self.encoder, partial(told, row)) for row in range(len(prompts))]
        found = generate(
            self.model,
            [self.encoder.encode([prompt.encode()])[0].tolist() for prompt in prompts],
            sampling,
            eos=self.encoder.eos_id,
            max_new_tokens=max_new_tokens,
            max_positions=self.model.config.max_position_embeddings,
            told=lambda row, token: hearers[row](token),
        )
        for hear in hearers:
            hear(None)
        return [self.encoder.decode(new) for new in found]


def pieces(encoder: Encoder, told: Callable[[str], None]) -> Callable[[int | None], None]:
    """To be called with each token as it comes, and with None at the end: `told` hears whole characters."""
    tokens: list[int] = []
    said = ""

    def hear(token: int | None) -> None:
        nonlocal said
        tokens.extend([] if token is None else [token])
        text = encoder.decode(tokens)
        if token is None or not text.endswith("\ufffd"):  # a character that is not complete yet
            if len(text) > len(said):
                told(text[len(said) :])
            said = text

    return hear


def load_published(folder: str, *, endpoint_url: str | None = None) -> Published:
    """From a local folder or an s3:// URI; on CUDA where there is one, in fp32. What a folder that was published here vouches for is
    checked before it is used. Raises ValueError naming what is wrong there."""
    storage = Storage(StorageConfig(root=folder, endpoint_url=endpoint_url))
    manifest = manifest_in(storage, "")
    for entry in manifest.files if manifest is not None else ():
        if entry.path.endswith(SMALL):
            _check(storage, entry)
    config = read_config("", storage)
    with torch.device("meta"):
        model = Moonlight(config)
    model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    load_hf(model, "", storage, manifest)
    return Published(model.eval().requires_grad_(False), Encoder.load("", storage))


def _check(storage: Storage, entry: FileEntry) -> None:
    try:
        read_checked(storage, entry)
    except DamagedFile as error:
        raise DamagedFile(f"{error}; fetch it again, or remove manifest.json if it was changed on purpose") from None
