"""The encoder: UTF-8 documents in, token ids out, at engine speed (about 100 MB per CPU-second).

gigatoken does the work. It is given no special tokens, so a literal "[EOS]" in a web page stays text; the closing EOS is
added by id, by whoever lays out documents. `check` encodes the same text with a second, independent engine (fastokens).
gigatoken 0.10 caches pieces without bound; `recycle` starts a new engine once the process has grown too far.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import fastokens
import gigatoken
import numpy as np
import psutil

from pipeline.storage import Storage
from pipeline.tokenizer.files import CONFIG_JSON, RANK_FILE, TOKENIZER_JSON, special_tokens_of


class Encoder:
    """Construct with `Encoder.load`. Encodes on the calling thread only."""

    def __init__(self, files: dict[str, bytes], *, growth_limit_bytes: int = 400 * 1024 * 1024) -> None:
        self._files = files
        self._growth_limit_bytes = growth_limit_bytes
        self.sha256 = hashlib.sha256(files[TOKENIZER_JSON]).hexdigest()
        self.special_tokens = special_tokens_of(files[TOKENIZER_JSON])
        settings = json.loads(files[CONFIG_JSON]) if CONFIG_JSON in files else {}
        eos = settings.get("eos_token", "[EOS]")
        eos = eos["content"] if isinstance(eos, dict) else eos
        if eos not in self.special_tokens:
            raise ValueError(f"{TOKENIZER_JSON}: its eos_token {eos!r} is not one of its special tokens")
        self.eos_id = self.special_tokens[eos]
        self._start()
        self.vocab_size = max(self._engine.vocab_size, max(self.special_tokens.values()) + 1)

    @classmethod
    def load(cls, folder: str | Path, storage: Storage | None = None) -> Encoder:
        """From a local folder, or from a folder of `storage` (path relative to its root)."""
        files = {}
        for name in (RANK_FILE, TOKENIZER_JSON, CONFIG_JSON):
            data = storage.read_or_none(f"{folder}/{name}") if storage else _read_local(Path(folder) / name)
            if data is not None:
                files[name] = data
        if TOKENIZER_JSON not in files:
            raise ValueError(f"tokenizer {folder}: there is no {TOKENIZER_JSON}")
        return cls(files)

    def encode(self, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """ids uint32 [N] of all documents in a row, offsets int64 [n + 1] of each. No EOS. Input must be valid UTF-8."""
        if not documents:
            return np.zeros(0, np.uint32), np.zeros(1, np.int64)
        layout = self._engine.encode_batch(list(documents), parallel=False).layout
        offsets = np.asarray(layout.offsets, dtype=np.int64)
        ids = np.asarray(layout.content.data, dtype=np.uint32)
        return ids[offsets[0] : offsets[-1]], offsets - offsets[0]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text; bytes that are not UTF-8 (a cut inside a character) become U+FFFD. Special tokens by their names."""
        names = {token_id: name for name, token_id in self.special_tokens.items()}
        parts, start = [], 0
        values = [int(token_id) for token_id in ids]
        for position, token_id in enumerate([*values, None]):
            if token_id is None or token_id in names:
                parts.append(self._engine.decode(values[start:position]) if position > start else b"")
                parts.append(names[token_id].encode() if token_id is not None else b"")
                start = position + 1
        return b"".join(parts).decode("utf-8", errors="replace")

    def check(self, document: bytes) -> np.ndarray:
        """ids uint32 [N] of one document from the second engine."""
        ids, _ = self._second_engine.encode_batch_flat([document.decode()], split_special_tokens=True)
        return np.frombuffer(ids, dtype="<u4")

    def recycle(self) -> bool:
        """Start a new engine if the process grew by more than the limit since this one started. True if it did."""
        if psutil.Process().memory_info().rss - self._start_rss < self._growth_limit_bytes:
            return False
        self._start()
        return True

    def _start(self) -> None:
        self._engine = _engine(self._files)
        self._start_rss = psutil.Process().memory_info().rss

    @cached_property
    def _second_engine(self) -> fastokens.Tokenizer:
        return fastokens.Tokenizer.from_json_str(self._files[TOKENIZER_JSON].decode())


def _engine(files: dict[str, bytes]) -> gigatoken.Tokenizer:
    if RANK_FILE in files:
        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.write(files[RANK_FILE])
            file.flush()
            return gigatoken.Tokenizer.from_tiktoken(file.name, pretokenizer="kimi")
    document = json.loads(files[TOKENIZER_JSON])
    document["added_tokens"] = []
    try:
        return gigatoken.Tokenizer.from_json(json.dumps(document))
    except Exception as error:  # the engine names what it cannot do; the user needs to know what to change
        raise ValueError(
            f"tokenizer.path: the encoder cannot run this {TOKENIZER_JSON} ({error}); use one with the split pattern of "
            "Moonlight, GPT-2, cl100k, o200k, Qwen, OLMo or DeepSeek-V3"
        ) from error


def _read_local(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
