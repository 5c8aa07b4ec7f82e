"""The weights a run starts from: drawn from its seed, a Hugging Face folder, or the model that is promoted when the run begins.

`training.initial_weights` is one of

    null                                   drawn afresh
    <folder>                               an absolute path, an s3:// URI, or a path below the storage root
    <folder>@sha256:<64 hex digits>        a model published here, pinned by the digest of its manifest
    promoted                               the version that models/<publishing.name>/latest.json points at
    promoted-or-fresh                      the same, or afresh while nothing is promoted

The last two are questions. `pin` answers them once in a run's life and commits the answer by a conditional create,

    <root>/runs/<run_id>/initial_weights.json

so that neither a restart nor another stage nor a second driver answers otherwise when a newer model is promoted meanwhile.
From then on the configuration holds the answer, a folder pinned by digest, and so do the run's identity, its checkpoints
and the model it publishes. The optimizer's moments are not published: they start at zero.
"""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.config.load import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.integrity import read_record
from pipeline.manifest import ModelManifest, Record
from pipeline.publishing import registry
from pipeline.storage import Storage

PROMOTED, PROMOTED_OR_FRESH = QUESTIONS = ("promoted", "promoted-or-fresh")
MAY_DIFFER = {"initializer_range", "max_position_embeddings"}  # settings of a network that its weights do not know
KEY = "training.initial_weights"


class Answer(Record):
    """`<root>/runs/<run_id>/initial_weights.json`"""

    initial_weights: str | None  # None: nothing was promoted when the run began, so it starts afresh


def answer_path(run_id: str) -> str:
    return f"runs/{run_id}/initial_weights.json"


def answer_of(run_id: str, storage: Storage) -> Answer | None:
    return read_record(storage, answer_path(run_id), Answer)


def pinned(config: RunConfig, storage: Storage) -> RunConfig:
    """The configuration with the question answered, if this run has answered it; writes nothing."""
    if config.training.initial_weights not in QUESTIONS:
        return config
    answer = answer_of(config.run_id, storage)
    return config if answer is None else _with(config, answer)


def pin(config: RunConfig, storage: Storage) -> RunConfig:
    """The same, and a run that has not answered answers now. Raises ConfigError if it cannot start from what is promoted."""
    config = pinned(config, storage)
    question = config.training.initial_weights
    if question not in QUESTIONS:
        return config
    latest = registry.latest(storage, config.publishing.name)
    if latest is None and question == PROMOTED:
        raise ConfigError(
            f"{KEY} {PROMOTED}: nothing is at {storage.uri(registry.latest_path(config.publishing.name))}; publish a model, "
            f"set publishing.name to one that is, or let the first run start afresh with {PROMOTED_OR_FRESH}"
        )
    weights = None
    if latest is not None:
        weights = f"{registry.folder(config.publishing.name, latest.version)}@sha256:{latest.manifest_digest}"
    made = _with(config, Answer(initial_weights=weights))
    check(made, storage)
    storage.create(answer_path(config.run_id), Answer(initial_weights=weights).to_json())
    return pinned(config, storage)  # of several drivers the first one's answer holds


def check(config: RunConfig, storage: Storage, tokenizer_sha256: str | None = None) -> None:
    """Can the run start from the model that it names? Of folders that were not published here only the loading knows.

    Raises ConfigError for another network, another tokenizer, or a folder that is not what it was.
    """
    manifest = find(config, storage)
    if manifest is None:
        return
    ours, theirs = config.model.model_dump(mode="json"), manifest.config["model"]
    found = [
        f"model.{name} is {ours.get(name)!r} here and {theirs.get(name)!r} there"
        for name in sorted((ours.keys() | theirs.keys()) - MAY_DIFFER)
        if ours.get(name) != theirs.get(name)
    ]
    if tokenizer_sha256 not in (None, manifest.tokenizer_sha256):
        found.append(
            f"the corpus is tokenized with {str(tokenizer_sha256)[:16]}..., the model knows {manifest.tokenizer_sha256[:16]}...; "
            f"set tokenizer.path to {storage.uri(registry.folder(manifest.name, manifest.version))}"
        )
    if found:
        raise ConfigError(f"{KEY}: {config.training.initial_weights} does not fit this run: {'; '.join(found)}")


def find(config: RunConfig, storage: Storage) -> ModelManifest | None:
    """The manifest of the model that the run starts from; None for a fresh run and for folders without one."""
    weights = config.training.initial_weights
    if weights is None or weights in QUESTIONS:
        return None
    folder, digest = split(weights)
    if folder.startswith("s3://") or Path(folder).is_absolute():
        return None
    data = storage.read_or_none(f"{folder}/manifest.json")
    if data is None:
        if digest is None:
            return None
        raise ConfigError(f"{KEY}: {storage.uri(folder)} has no manifest.json: was the version deleted?")
    manifest = ModelManifest.parse(data, storage.uri(f"{folder}/manifest.json"))
    if digest not in (None, manifest.digest):
        raise ConfigError(f"{KEY}: {storage.uri(folder)} has digest {manifest.digest}, but {digest} was asked for")
    return manifest


def manifest_in(storage: Storage, folder: str) -> ModelManifest | None:
    """What a folder that was published here says about itself, wherever it has been copied to; None for others."""
    path = f"{folder}/manifest.json" if folder else "manifest.json"
    data = storage.read_or_none(path)
    return ModelManifest.parse(data, storage.uri(path)) if data and b'"checkpoint_digest"' in data else None


def split(weights: str) -> tuple[str, str | None]:
    """(folder, digest) of `<folder>` or `<folder>@sha256:<digest>`."""
    found = re.fullmatch(r"(.+)@sha256:([0-9a-f]{64})", weights)
    return (found.group(1), found.group(2)) if found else (weights, None)


def _with(config: RunConfig, answer: Answer) -> RunConfig:
    training = config.training.model_copy(update={"initial_weights": answer.initial_weights})
    return config.model_copy(update={"training": training})
