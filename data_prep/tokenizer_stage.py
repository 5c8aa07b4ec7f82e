"""The tokenizer of a dataset: loaded, or trained on a sample of the corpus, committed under `tokenizers/<identity>/`.

It depends on the settings of its own section and on the files that it is trained on, not on the mixture: the weight of a
source in training is no reason to tokenize anything again. A corpus that only grew, by files or by sources, keeps its
tokenizer: one that was trained here with the same settings, on files that are all still in the corpus, is used again, so
that old shards stay valid and a checkpoint's vocabulary stays the vocabulary.

When it is committed, it is decided which engine encodes (pipeline/tokenizer/agreement.py); the manifest says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError

from data_prep.filters import rejected_by
from data_prep.listing import InputFile, Listing, hash_order
from data_prep.plan import Slice
from data_prep.readers import ReaderSettings, read_slice
from data_prep.tokenize_unit import document_hash, is_heldout_candidate, open_input
from pipeline.config.load import ConfigError, expand_path
from pipeline.config.schema import DEFAULT_EOS, RunConfig, SourceConfig
from pipeline.integrity import read_record
from pipeline.manifest import DamagedRecord, FileEntry, TokenizerManifest, digest_of
from pipeline.storage import Storage, filesystem
from pipeline.tokenizer import Encoder, find_engines, read_given, train_tokenizer
from pipeline.tokenizer.agreement import Agreement
from pipeline.tokenizer.engines import FAST, REFERENCE, REFERENCE_DOCUMENT_BYTES
from pipeline.tokenizer.files import CONFIG_JSON, RANK_FILE, TOKENIZER_JSON
from pipeline.tokenizer.given import CHAT_TEMPLATES, NAMES

CORE_HOURS = {"gigatoken": "2", "fastokens": "2 to 10", REFERENCE: "150"}  # of encoding alone: benchmarks/prepare.py
SMALLEST_SHARE = 64 * 1024  # bytes taken from one file of the sample, at least


def tokenizer_identity(config: RunConfig) -> dict[str, Any]:
    """What, beside the corpus, decides the tokenizer. Raises ConfigError if `tokenizer.path` holds none."""
    settings = config.tokenizer
    if settings.path is None:
        return {
            "settings": {
                "vocab_size": settings.vocab_size,
                "training_bytes": settings.training_bytes,
                "sources": settings.sources,
                "special_tokens": list(settings.trained_special_tokens),
                "eos_token": settings.eos_token or DEFAULT_EOS,
            }
        }
    names = {"eos_token": settings.eos_token, "special_tokens": settings.special_tokens}
    files = {name: hashlib.sha256(data).hexdigest() for name, data in _given_files(config).items()}
    return {"settings": names, "files": files}


def find_tokenizer(config: RunConfig, storage: Storage, listings: dict[str, Listing]) -> TokenizerManifest | None:
    """The committed tokenizer of this configuration and corpus, if there is one."""
    if config.tokenizer.path is None:
        grown = _trained_on_less(storage, tokenizer_identity(config), _corpus_of(config, listings))
        if grown is not None:
            return grown
    return read_record(storage, f"{_folder(config, listings)}/manifest.json", TokenizerManifest)


def ensure_tokenizer(config: RunConfig, storage: Storage, listings: dict[str, Listing]) -> TokenizerManifest:
    """The committed tokenizer; trains one if there is none yet."""
    done = find_tokenizer(config, storage, listings)
    if done is not None:
        return done
    training = _training(config, listings)
    folder = _folder(config, listings)
    if training is None:
        try:
            given = read_given(_given_files(config), config.tokenizer)
            agreement = find_engines(given.files)
        except ValueError as error:
            raise ConfigError(f"tokenizer.path: {config.tokenizer.path}: {error}") from error
        return _commit(storage, folder, given.files, agreement, [*given.notes, *_left_beside(config)], None, config)
    files = train_tokenizer(sample(config, listings), config.tokenizer)
    return _commit(storage, folder, files, find_engines(files), (), training, config)


def check_given(config: RunConfig) -> None:
    """Can the tokenizer at `tokenizer.path` be used? Writes nothing. Raises ConfigError."""
    if config.tokenizer.path is None:
        return
    try:
        given = read_given(_given_files(config), config.tokenizer)
    except ConfigError:
        raise
    except (OSError, ValueError, BotoCoreError) as error:
        message = " ".join(str(error).split())
        raise ConfigError(
            f"tokenizer.path: {config.tokenizer.path} cannot be used ({type(error).__name__}: {message})"
        ) from None
    _refuse_small_vocabulary(Encoder(given.files), config)


def _refuse_small_vocabulary(encoder: Encoder, config: RunConfig) -> None:
    if encoder.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {config.model.vocab_size} is too small for the tokenizer's {encoder.vocab_size} ids; "
            f"set it to at least {encoder.vocab_size}"
        )


def tokenizer_sources(config: RunConfig) -> dict[str, float]:
    """Of the sources that a tokenizer is trained on, the share of its text, in the corpus's order."""
    shares = config.tokenizer.sources or dict.fromkeys((source.name for source in config.corpus.sources), 1.0)
    total = sum(shares.values())
    return {source.name: shares[source.name] / total for source in config.corpus.sources if source.name in shares}


def sample(config: RunConfig, listings: dict[str, Listing]) -> Iterator[str]:
    """About `tokenizer.training_bytes` of text: of each source its share of it, spread over its files in hash order.

    Documents that could be held out are not looked at. Sources that are read alike from the same files (the languages of one) are read
    once, for their shares together: each would give the same texts.
    """
    shares, together = tokenizer_sources(config), dict[str, tuple[SourceConfig, float]]()
    for source in config.corpus.sources:
        files = listings[source.name]
        alike = digest_of([files.root, files.digest, _reading(source)])
        first, share = together.get(alike, (source, 0.0))
        together[alike] = first, share + shares.get(source.name, 0.0)
    for source, share in together.values():
        yield from _sample(config, source, listings[source.name], int(config.tokenizer.training_bytes * share))


def _sample(config: RunConfig, source: SourceConfig, listing: Listing, budget: int) -> Iterator[str]:
    files = sorted((file for file in listing if file.bytes), key=lambda file: hash_order(file.path))
    share = max(budget // max(len(files), 1), min(budget // 64, 1 << 24), SMALLEST_SHARE)
    for file in files:
        if budget <= 0:
            break
        for text in _texts(config, source, listing.root, file, min(share, budget)):
            budget -= len(text)
            yield text.decode()


def _texts(config: RunConfig, source: SourceConfig, root: str, file: InputFile, budget: int) -> Iterator[bytes]:
    reader = ReaderSettings.of(source, config.corpus.max_document_bytes)
    with open_input(root, file.path, config.storage) as handle:
        for record in read_slice(Slice(file.path, file.bytes, file.identity), handle, reader):
            if record.reason or record.rejected or rejected_by(record.text, source.filters):
                continue
            if is_heldout_candidate(document_hash(record.text), config.corpus.heldout_fraction):
                continue
            text = record.text[:budget]
            yield text if len(text) == len(record.text) else text.decode(errors="ignore").encode()
            budget -= len(text)
            if budget <= 0:
                return


def _training(config: RunConfig, listings: dict[str, Listing]) -> dict[str, Any] | None:
    """What a trained tokenizer is made from; None for one that is loaded."""
    if config.tokenizer.path is not None:
        return None
    return {"settings": tokenizer_identity(config), "corpus": _corpus_of(config, listings)}


def _folder(config: RunConfig, listings: dict[str, Listing]) -> str:
    return f"tokenizers/{digest_of(_training(config, listings) or tokenizer_identity(config))[:32]}"


def _corpus_of(config: RunConfig, listings: dict[str, Listing]) -> dict[str, Any]:
    corpus = {}
    for source in config.corpus.sources:
        if source.name not in tokenizer_sources(config):
            continue
        corpus[source.name] = {
            "settings": _reading(source),
            "files": {file.path: file.identity for file in listings[source.name]},
        }
    return {"sources": corpus, "heldout_fraction": config.corpus.heldout_fraction}


def _reading(source: SourceConfig) -> dict[str, Any]:
    """What decides the texts of a source's files. The sample takes documents as they come."""
    settings = source.model_dump(mode="json", include={"format", "text_field", "filters"})
    del settings["filters"]["drop_exact_duplicates"]
    return settings


def _trained_on_less(storage: Storage, settings: dict[str, Any], corpus: dict[str, Any]) -> TokenizerManifest | None:
    """The tokenizer of the largest earlier corpus of which this one is a superset, if any."""
    found = []
    for entry in storage.list("tokenizers"):
        if not entry.path.endswith("/training.json"):
            continue
        earlier = _read_training(storage, entry.path)
        if earlier["settings"] != settings or earlier["corpus"]["heldout_fraction"] != corpus["heldout_fraction"]:
            continue
        sources = earlier["corpus"]["sources"]
        now = corpus["sources"]
        if sources.keys() <= now.keys() and all(
            before["settings"] == now[name]["settings"] and before["files"].items() <= now[name]["files"].items()
            for name, before in sources.items()
        ):
            size = sum(len(source["files"]) for source in sources.values())
            found.append((-size, entry.path))
    for _, path in sorted(found):
        manifest = read_record(storage, path.replace("training.json", "manifest.json"), TokenizerManifest)
        if manifest is not None:
            return manifest
    return None


def _read_training(storage: Storage, path: str) -> dict[str, Any]:
    """What an earlier tokenizer was trained on. Its folder is named by the digest of that. Raises DamagedRecord."""
    try:
        found: dict[str, Any] = json.loads(storage.read(path))
    except ValueError as error:
        raise DamagedRecord(f"{storage.uri(path)}: {error}; restore it from a copy, or delete its folder") from None
    if digest_of(found)[:32] != path.split("/")[-2]:
        raise DamagedRecord(
            f"{storage.uri(path)}: not what its folder is named after; restore it from a copy, or delete its folder"
        )
    return found


def _commit(
    storage: Storage,
    folder: str,
    files: dict[str, bytes],
    agreement: Agreement,
    notes: Sequence[str],
    training: dict[str, Any] | None,
    config: RunConfig,
) -> TokenizerManifest:
    encoder = Encoder(files)
    _refuse_small_vocabulary(encoder, config)
    if agreement.engines[0] != FAST[0]:
        notes = [*notes, _cost(agreement)]
    if training is not None:
        storage.write(f"{folder}/training.json", json.dumps(training, indent=1, sort_keys=True).encode() + b"\n")
    for name, data in files.items():
        storage.write(f"{folder}/{name}", data)
    manifest = TokenizerManifest(
        folder=folder,
        files=tuple(
            FileEntry(path=f"{folder}/{name}", bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            for name, data in sorted(files.items())
        ),
        vocab_size=encoder.vocab_size,
        eos_id=encoder.eos_id,
        special_tokens=encoder.special_tokens,
        sha256=encoder.sha256,
        engines=agreement.engines,
        notes=tuple(notes),
    )
    path = f"{folder}/manifest.json"
    storage.create(path, manifest.to_json())
    return TokenizerManifest.parse(storage.read(path), storage.uri(path))


def _cost(agreement: Agreement) -> str:
    """A rough figure, which is what one needs to know of a factor of 10 or 100; rounded, so that every prepare says the same."""
    name = agreement.engines[0]
    note = f"encoded by {name}, {CORE_HOURS[name]} core-hours a TB of text (gigatoken: {CORE_HOURS['gigatoken']}), because "
    note += "; ".join(agreement.reasons)
    if name == REFERENCE:
        note += f". Documents over {REFERENCE_DOCUMENT_BYTES >> 20} MiB go to quarantine: it takes 116 bytes of memory a byte"
    return note


def _left_beside(config: RunConfig) -> list[str]:
    """A path to one file means that file; who gave it may not know what stands beside it."""
    assert config.tokenizer.path is not None
    path = expand_path(config.tokenizer.path).rstrip("/")
    fs = filesystem(path, config.storage)
    key = path.removeprefix("s3://")
    folder = key.rpartition("/")[0]
    if not fs.isfile(key) or not fs.exists(f"{folder}/{CONFIG_JSON}"):
        return []
    return [
        f"tokenizer.path names one file; {CONFIG_JSON} beside it (roles, chat template) is not used: name the folder to use it"
    ]


def _given_files(config: RunConfig) -> dict[str, bytes]:
    """The tokenizer files at `tokenizer.path`, which may be a folder or one file."""
    assert config.tokenizer.path is not None
    path = expand_path(config.tokenizer.path).rstrip("/")
    fs = filesystem(path, config.storage)
    key = path.removeprefix("s3://")
    if fs.isfile(key):
        name = RANK_FILE if Path(key).suffix in {".model", ".tiktoken"} else TOKENIZER_JSON
        return {name: fs.cat_file(key)}
    found = {name: fs.cat_file(f"{key}/{name}") for name in NAMES if fs.exists(f"{key}/{name}")}
    if fs.exists(f"{key}/{CHAT_TEMPLATES}"):
        for path in sorted(fs.ls(f"{key}/{CHAT_TEMPLATES}", detail=False)):
            if path.endswith(".jinja"):
                found[f"{CHAT_TEMPLATES}/{Path(path).name}"] = fs.cat_file(path)
    if RANK_FILE not in found and TOKENIZER_JSON not in found:
        raise ConfigError(
            f"tokenizer.path: {path} holds neither {TOKENIZER_JSON} nor {RANK_FILE}; of other formats, "
            f"AutoTokenizer.from_pretrained(...).save_pretrained(...) writes a {TOKENIZER_JSON}"
        )
    return found
