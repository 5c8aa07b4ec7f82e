"""The encoder: UTF-8 documents in, the published tokenizer's token ids out, at engine speed (gigatoken: 100 MB per CPU-second).

Special tokens are not recognised: a literal "[EOS]" in a web page stays text; the closing EOS is added by id, by whoever
lays out documents. `engines` names who encodes, as `find_engines` chose: the first all documents, the second, if there is
one, those with letters that not every Unicode table has. By default the reference does; it is slow, and right by
definition. `check` is the reference, too. Where Moonlight's pattern splits, only the lines with such letters are encoded apart;
and the first of them by the reference: in most corpora there are few, and another engine takes as long to build. gigatoken 0.10 caches pieces without bound; `recycle` starts a new engine once
the process has grown too far.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import orjson
import psutil

from pipeline.manifest import TokenizerManifest
from pipeline.storage import Storage
from pipeline.tokenizer.chat import ChatTemplate, template_of
from pipeline.tokenizer.engines import REFERENCE, REFERENCE_DOCUMENT_BYTES, Engine, Reference, concatenated, engine
from pipeline.tokenizer.files import CONFIG_JSON, RANK_FILE, TOKENIZER_JSON, checked_files
from pipeline.tokenizer.given import CHAT_TEMPLATE, token_bytes
from pipeline.tokenizer.newer_letters import holds_newer_letters

NEWER_BYTES = 512 * 1024  # of documents or lines with newer letters, before their engine is built
_LINE = re.compile(rb"(?<=\n)(?=[!-~])")


class Encoder:
    """Construct with `Encoder.load`. Encodes on the calling thread only."""

    def __init__(
        self,
        files: dict[str, bytes],
        engines: Sequence[str] = (REFERENCE,),
        *,
        growth_limit_bytes: int = 400 * 1024 * 1024,
    ) -> None:
        self._files = files
        self._growth_limit_bytes = growth_limit_bytes
        self.engines = tuple(engines)
        self.sha256 = hashlib.sha256(files[TOKENIZER_JSON]).hexdigest()
        document = orjson.loads(files[TOKENIZER_JSON])
        self.special_tokens = {token["content"]: token["id"] for token in document["added_tokens"] if token["special"]}
        settings = json.loads(files[CONFIG_JSON]) if CONFIG_JSON in files else {}
        eos = settings.get("eos_token", "[EOS]")
        eos = eos["content"] if isinstance(eos, dict) else eos
        if eos not in self.special_tokens:
            raise ValueError(f"{TOKENIZER_JSON}: its eos_token {eos!r} is not one of its special tokens")
        self.eos_id = self.special_tokens[eos]
        ids = [*document["model"]["vocab"].values(), *(token["id"] for token in document["added_tokens"])]
        self.vocab_size = max(ids) + 1
        # Moonlight's pattern ends a piece at a line end before a printable character, and no token in the text is looked for
        self._lines_are_apart = RANK_FILE in files and all(token["special"] for token in document["added_tokens"])
        self._newer_bytes = 0
        self._start()

    @classmethod
    def load(cls, folder: str | Path, storage: Storage | None = None, engines: Sequence[str] = (REFERENCE,)) -> Encoder:
        """From a local folder, or from a folder of `storage` (path relative to its root; "": the root)."""
        files = {}
        for name in (TOKENIZER_JSON, CONFIG_JSON, RANK_FILE, CHAT_TEMPLATE):
            data = storage.read_or_none(f"{folder}/{name}".lstrip("/")) if storage else _read_local(Path(folder) / name)
            if data is not None:
                files[name] = data
        if TOKENIZER_JSON not in files:
            raise ValueError(f"tokenizer {folder}: there is no {TOKENIZER_JSON}")
        return cls(files, engines)

    @classmethod
    def stored(cls, tokenizer: TokenizerManifest, storage: Storage, engines: Sequence[str] = (REFERENCE,)) -> Encoder:
        """That of a dataset. Raises DamagedFile if any of its files is not as it was written."""
        return cls(checked_files(tokenizer, storage), engines)

    def encode(self, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """ids uint32 [N] of all documents in a row, offsets int64 [n + 1] of each. No EOS. Input must be valid UTF-8."""
        if not documents:
            return np.zeros(0, np.uint32), np.zeros(1, np.int64)
        newer = holds_newer_letters(documents) if len(self.engines) > 1 else np.zeros(len(documents), bool)
        if not newer.any():
            return self._engine.encode(documents)
        if not self._lines_are_apart:
            return self._encode_apart(documents, newer)
        lines, edges = list[bytes](), [0]
        for document, is_newer in zip(documents, newer.tolist()):
            lines += _LINE.split(document) if is_newer else [document]
            edges.append(len(lines))
        ids, offsets = self._encode_apart(lines, holds_newer_letters(lines))
        return ids, offsets[edges]

    def _encode_apart(self, documents: Sequence[bytes], newer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts: list[np.ndarray] = [np.zeros(0, np.uint32)] * len(documents)
        for chosen, encode in ((newer, self._encode_newer_letters), (~newer, self._engine.encode)):
            places = np.flatnonzero(chosen).tolist()
            if places:
                ids, offsets = encode([documents[place] for place in places])
                for at, place in enumerate(places):
                    parts[place] = ids[offsets[at] : offsets[at + 1]]
        return concatenated(parts)

    @property
    def has_chat_template(self) -> bool:
        return template_of(self._files) is not None

    @cached_property
    def chat(self) -> ChatTemplate:
        """How conversations are laid out. Raises ValueError if the tokenizer does not say."""
        return ChatTemplate(self._files)

    def takes(self, document: bytes) -> bool:
        """False where it would take the reference more memory than a unit has: see REFERENCE_DOCUMENT_BYTES."""
        if len(document) <= REFERENCE_DOCUMENT_BYTES or REFERENCE not in self.engines:
            return True
        return self.engines[0] != REFERENCE and not holds_newer_letters([document])[0]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text; bytes that are not UTF-8 (a cut inside a character) become U+FFFD. Added tokens by their names; an id
        without a token, which a network with a larger vocabulary may choose, is nothing, as in `tokenizers`."""
        parts = [self._bytes.get(token_id, b"") for token_id in np.asarray(ids, np.int64).tolist()]
        return b"".join(parts).decode("utf-8", errors="replace")

    def check(self, document: bytes) -> np.ndarray:
        """ids uint32 [N] of one document from the reference."""
        return self._reference.ids(document)

    def recycle(self) -> bool:
        """Start a new engine if the process grew by more than the limit since this one started. True if it did."""
        if psutil.Process().memory_info().rss - self._start_rss < self._growth_limit_bytes:
            return False
        self._start()
        return True

    def _start(self) -> None:
        self._engine = self._reference if self.engines[0] == REFERENCE else engine(self.engines[0], self._files)
        self._start_rss = psutil.Process().memory_info().rss

    def _encode_newer_letters(self, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        self._newer_bytes += sum(map(len, documents))
        few = self._newer_bytes <= NEWER_BYTES
        return (self._reference if few else self._engine_of_newer_letters).encode(documents)

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        return token_bytes(orjson.loads(self._files[TOKENIZER_JSON]))

    @cached_property
    def _engine_of_newer_letters(self) -> Engine:
        return self._reference if self.engines[1] == REFERENCE else engine(self.engines[1], self._files)

    @cached_property
    def _reference(self) -> Reference:
        return Reference(self._files)


def _read_local(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
