"""Is what was written the model that was trained, for whoever will load it? Asked of transformers, before the manifest commits it.

`open_published` holds every name, shape and dtype against the layout. `check_first_layers` runs the layers up to the first mixture
of experts, loaded by transformers from the published bytes, beside our network with the checkpoint's weights: a tensor under a wrong
name, transposed or rounded otherwise computes something else. Memory: those layers in fp32, one network after the other.
`check_texts` lets transformers judge the card's greedy samples: at every position it must find the token that was written the
likeliest, which is to say that it writes the same text. Memory: the whole network in fp32, as writing the samples takes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.config.schema import RunConfig
from pipeline.model.moonlight import Moonlight
from pipeline.model.safetensors import TensorFiles
from pipeline.publishing.layout import INDEX, WeightFile, published_dtype, published_tensors
from pipeline.storage import Storage
from pipeline.training.files import CheckpointReader

TOKENS = 64  # of the vocabulary, that the first layers are tried on
ROWS = 2
TOLERANCE = 1e-3  # of the largest logit
MAY_DIFFER = 0.25  # of the positions: where two experts are nearly equal for a token, another may be chosen
TIE = 1e-2  # logits of two tokens that are equally likely, as far as two programs add up alike


class NotTheModel(ValueError):
    """What was published computes something else than the checkpoint; nothing is committed."""


def open_published(
    config: RunConfig, files: list[WeightFile], storage: Storage, folder: str, xxh3: dict[str, str]
) -> TensorFiles:
    """The published tensors, after a look at every header. Raises ValueError for a name, shape or dtype that is not as planned."""
    found = TensorFiles([file.name for file in files], lambda name: storage.open(f"{folder}/{name}"), xxh3)
    expected = {tensor.name: (tensor.dtype, tensor.shape) for tensor in published_tensors(config)}
    there = {name: (entry.dtype, entry.shape) for name, entry in found.entries.items()}
    if there != expected:
        wrong = sorted(name for name in expected.keys() | there.keys() if expected.get(name) != there.get(name))
        raise NotTheModel(
            f"{storage.uri(folder)}: {wrong[0]} is {there.get(wrong[0], 'not there')}, expected {expected.get(wrong[0], 'no such tensor')}"
        )
    return found


def check_first_layers(
    config: RunConfig, reader: CheckpointReader, published: TensorFiles, config_json: dict[str, Any], where: str
) -> None:
    """Raises NotTheModel if transformers computes something else from the published bytes than we do from the checkpoint."""
    layers = min(config.model.num_hidden_layers, config.model.first_k_dense_replace + 1)
    tokens = min(TOKENS, config.model.vocab_size)
    network = config.model.model_copy(update={"num_hidden_layers": layers, "vocab_size": tokens})
    length = min(TOKENS, network.max_position_embeddings)
    rows = [torch.randperm(tokens, generator=torch.Generator().manual_seed(row))[:length] for row in range(ROWS)]
    tokens_BS = torch.stack(rows)

    with torch.device("meta"):
        ours = Moonlight(network)
    ours.to_empty(device="cpu")
    for name, tensor in ours.state_dict().items():
        rounded = torch.empty(tensor.shape, dtype=published_dtype(name, config.publishing.dtype))
        reader.read_box(name, rounded, [0] * rounded.dim())
        tensor.copy_(rounded)
    with torch.no_grad():
        expected_BSV = ours.eval()(tokens_BS)
    del ours

    tensors = {}
    for tensor in published_tensors(config.model_copy(update={"model": network})):
        whole = published.read(tensor.name)
        tensors[tensor.name] = whole[: tensor.shape[0]].contiguous()  # of embedding and head the rows of these tokens
    fields = config_json | {"num_hidden_layers": layers, "vocab_size": tokens}
    fields |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    with tempfile.TemporaryDirectory() as scratch:
        save_file(tensors, Path(scratch) / "model.safetensors", metadata={"format": "pt"})
        (Path(scratch) / "config.json").write_text(json.dumps(fields))
        del tensors
        theirs = load_with_transformers(scratch)
    with torch.no_grad():
        found_BSV = theirs(tokens_BS).logits
    largest_BS = (found_BSV - expected_BSV).abs().amax(-1) / expected_BSV.abs().amax().clamp(min=1e-30)
    differ = float((~(largest_BS <= TOLERANCE)).float().mean())  # NaN differs
    if differ > MAY_DIFFER:
        raise NotTheModel(
            f"{where}: transformers computes other logits from the first {layers} layers than the checkpoint gives, at "
            f"{differ:.0%} of the positions (by up to {float(largest_BS.amax()):.2g} of the largest one); nothing was committed"
        )


def check_texts(
    storage: Storage,
    folder: str,
    texts: Sequence[tuple[list[int], list[int]]],
    max_positions: int,
    device: torch.device,
) -> None:
    """`texts`: (prompt, what we wrote after it), token ids. Raises NotTheModel where transformers would have gone on otherwise."""
    with tempfile.TemporaryDirectory() as scratch:
        local = storage.key(folder)
        if storage.config.is_s3:
            local = scratch
            for info in storage.list(folder):
                if info.path.endswith((".safetensors", "config.json", INDEX)):
                    storage.fs.get_file(storage.key(info.path), str(Path(scratch) / Path(info.path).name))
        model = load_with_transformers(local).to(device)
    for prompt, new in texts:
        row = torch.tensor([*prompt, *new])[:max_positions]
        with torch.no_grad():
            logits_SV = model(row[None].to(device)).logits[0].float().cpu()
        for at in range(len(prompt), len(row)):
            logits_V = logits_SV[at - 1]
            best, short = int(logits_V.argmax()), float(logits_V.max() - logits_V[row[at]])
            if not short <= TIE:
                raise NotTheModel(
                    f"{storage.uri(folder)}: after {at} tokens of a sample transformers finds token {best} likelier than "
                    f"{int(row[at])}, which was written there (by {short:.3g}); nothing was committed"
                )


def load_with_transformers(folder: str) -> Any:
    from transformers import AutoModelForCausalLM, logging  # here: 3 s

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    finally:
        if shown:
            logging.enable_progress_bar()
    model, found = loaded
    wrong = {key: sorted(map(str, names)) for key, names in found.items() if names}
    if wrong:
        raise NotTheModel(f"{folder}: transformers does not find the tensors that it expects: {wrong}")
    return model.eval()
