"""What a checkpoint writes after the prompts of `publishing.sample_prompts`: the likeliest text, for people to read as training goes on.

    <root>/runs/<run_id>/evaluate/texts/step-00000040.json

Written where a checkpoint is judged by one process, which has the whole network then; sharded over ranks or in parts it is not. No torch
in here but where text is made.
"""

from __future__ import annotations

import re

from pipeline.config.schema import RunConfig
from pipeline.integrity import read_record
from pipeline.manifest import CheckpointManifest, Record
from pipeline.storage import Storage
from pipeline.tokenizer import Encoder

NAME = re.compile(r"step-\d{8,}\.json")


class Text(Record):
    prompt: str
    text: str  # what follows


class Written(Record):
    """The object itself."""

    step: int
    tokens_seen: int
    checkpoint_digest: str
    texts: tuple[Text, ...]


def texts_folder(run_id: str) -> str:
    return f"runs/{run_id}/evaluate/texts"


def write_texts(
    config: RunConfig, checkpoint: CheckpointManifest, model: object, encoder: Encoder, storage: Storage
) -> Written | None:
    """Have `model`, the whole network of the checkpoint, write and keep it; None without prompts, or for a mean of checkpoints."""
    prompts = config.publishing.sample_prompts
    if not prompts or checkpoint.average_of:
        return None
    import torch

    from pipeline.generation.sample import Sampling, generate  # here: readers need no torch

    assert isinstance(model, torch.nn.Module)
    with torch.inference_mode():
        found = generate(
            model,
            [encoder.encode([prompt.encode()])[0].tolist() for prompt in prompts],
            [Sampling()] * len(prompts),
            eos=encoder.eos_id,
            max_new_tokens=config.publishing.sample_tokens,
            max_positions=config.model.max_position_embeddings,
        )
    written = Written(
        step=checkpoint.step,
        tokens_seen=checkpoint.tokens_seen,
        checkpoint_digest=checkpoint.digest,
        texts=tuple(Text(prompt=prompt, text=encoder.decode(new)) for prompt, new in zip(prompts, found, strict=True)),
    )
    storage.write(f"{texts_folder(checkpoint.run_id)}/step-{checkpoint.step:08d}.json", written.to_json())
    return written


def read_texts(storage: Storage, run_id: str) -> list[Written]:
    """Of all checkpoints, oldest first. Raises DamagedRecord."""
    folder = texts_folder(run_id)
    names = sorted(name for name in storage.names(folder) if NAME.fullmatch(name))
    found = (read_record(storage, f"{folder}/{name}", Written) for name in names)
    return sorted((each for each in found if each is not None), key=lambda each: each.step)
