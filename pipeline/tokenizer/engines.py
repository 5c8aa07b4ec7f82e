"""Three programs that turn text into ids. They agree on most tokenizers; which may be used is decided by `agreement.py`.

    tokenizers   the reference: what `AutoTokenizer` runs on the published folder; 1-2 MB of text per CPU-second
    gigatoken    about 180 MB; knows a list of split patterns
    fastokens    about 150 MB on the common patterns, 20-45 on others

All take documents as they are: special tokens in a text stay text, added tokens that are not special are recognised, and
nothing is put before or after it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from typing import Any, Protocol

import fastokens
import gigatoken
import numpy as np
import orjson
from tokenizers import Tokenizer

from pipeline.tokenizer.files import (
    RANK_FILE,
    TOKENIZER_JSON,
    Ranks,
    format_ranks,
    ranks_of,
    split_pattern_of,
    tokenizer_document,
)
from pipeline.tokenizer.pattern import SPLIT_PATTERN

REFERENCE = "tokenizers"
FAST = ("gigatoken", "fastokens")  # in order of preference
OTHER_TABLES = {"gigatoken"}  # splits by a newer Unicode than the reference
REFERENCE_DOCUMENT_BYTES = 4 * 1024 * 1024  # `tokenizers` takes 116 bytes of memory a byte of source code: half a GB


class Engine(Protocol):
    def encode(self, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """ids uint32 [N] of all documents in a row, offsets int64 [n + 1] of each."""


def engine(name: str, files: dict[str, bytes]) -> Engine:
    """Raises whatever the engine raises for a tokenizer that it cannot run."""
    if name == "gigatoken":
        return Gigatoken(files)
    return Fastokens(files) if name == "fastokens" else Reference(files)


class Reference:
    """Hugging Face's `tokenizers`, without truncation and padding, which belong to a call."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.tokenizer = Tokenizer.from_str(files[TOKENIZER_JSON].decode())
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True

    def encode(self, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        return concatenated([self.ids(document) for document in documents])

    def ids(self, document: bytes) -> np.ndarray:
        (encoding,) = self.tokenizer.encode_batch_fast([document.decode()], add_special_tokens=False)
        return np.array(encoding.ids, np.uint32)


class Gigatoken:
    """It would recognise special tokens in a text, so it is not told of them. Moonlight's pattern it knows for rank files only."""

    def __init__(self, files: dict[str, bytes]) -> None:
        document = orjson.loads(files[TOKENIZER_JSON])
        document["added_tokens"] = [token for token in document["added_tokens"] if not token["special"]]
        ranks = files.get(RANK_FILE)  # committed where it says the same: `given.read_given`
        if ranks is None and (behind := ranks_behind(document)) is not None:
            ranks = format_ranks(behind)
        if ranks is None:
            self._tokenizer = gigatoken.Tokenizer.from_json(json.dumps(document))
            return
        added = {token["content"]: token["id"] for token in document["added_tokens"]}
        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.write(ranks)
            file.flush()
            self._tokenizer = gigatoken.Tokenizer.from_tiktoken(file.name, "kimi", added)

    def encode(self, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        # a batch at once would cost as much, and a quarter of a second for its array library
        return concatenated([self._tokenizer.encode(document) for document in documents])


class Fastokens:
    def __init__(self, files: dict[str, bytes]) -> None:
        self._tokenizer = fastokens.Tokenizer.from_json_str(files[TOKENIZER_JSON].decode())

    def encode(self, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        texts = [document.decode() for document in documents]
        found = [self._tokenizer.encode_batch_flat([text], split_special_tokens=True)[0] for text in texts]
        return concatenated([np.frombuffer(ids, "<u4") for ids in found])


def ranks_behind(document: dict[str, Any]) -> Ranks | None:
    """The ranks of which this tokenizer.json says the same in other words, if its pattern is Moonlight's."""
    if split_pattern_of(document) != SPLIT_PATTERN:
        return None
    try:
        ranks = ranks_of(document)
    except ValueError:
        return None
    ours = tokenizer_document(ranks, [])
    if document.get("normalizer") or document.get("pre_tokenizer") != ours["pre_tokenizer"]:
        return None
    model = {**ours["model"], **document["model"]}
    model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    model["vocab"] = ours["model"]["vocab"]  # `ranks_of` has read it
    return ranks if model == ours["model"] else None


def is_failure(error: BaseException) -> bool:
    """An engine's error or panic (which is no Exception), rather than the wish to stop."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def concatenated(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    return np.concatenate([np.zeros(0, np.uint32), *parts]).astype(np.uint32, copy=False), offsets
