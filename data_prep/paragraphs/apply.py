"""Documents of a shard without the parts that other documents keep.

Their text is what their tokens say (byte-level BPE loses nothing; the document's hash proves it), and what is left is encoded by the unit's
own engine: the ids are those of the new text. A document of which nothing is left goes. Where tokens do not give back the text, because the
tokenizer normalises it, the document stays as it is, and is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.paragraphs.parts import without
from pipeline.config.paragraphs import DuplicateParagraphs
from pipeline.tokenizer import Encoder

RULE = "duplicate_paragraphs"


@dataclass
class Cutter:
    """Of one unit. What it did is in `changes`, and in `emptied` the ordinals of documents that go."""

    settings: DuplicateParagraphs
    going: NDArray[np.uint64]  # ordinal << 32 | place, ascending; of documents that stay
    load: Callable[[], Encoder]  # asked for where there is something to do
    changes: Counter[str] = field(default_factory=Counter)
    emptied: list[int] = field(default_factory=list)

    def cut(
        self, first: int, tokens: np.ndarray, offsets: np.ndarray, n_bytes: np.ndarray, hashes: Sequence[bytes]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, offsets [n + 1] and sizes of documents first, first + 1, ..., as they are now; of one that goes none, and 0."""
        edges = np.array([first << 32, (first + len(n_bytes)) << 32], np.uint64)
        low, high = np.searchsorted(self.going, edges)
        places: dict[int, list[int]] = {}
        for key in self.going[low:high].tolist():
            places.setdefault((key >> 32) - first, []).append(key & 0xFFFFFFFF)
        texts: dict[int, bytes] = {}
        for document, numbers in places.items():
            text = self.load().decode(tokens[offsets[document] : offsets[document + 1]])
            if xxhash.xxh3_128_digest(text.encode()) != hashes[document]:
                self.changes[f"{RULE}.not_restored"] += 1
                continue
            texts[document] = without(text, numbers, self.settings).encode()
            if texts[document]:
                self.changes[f"{RULE}.{self.settings.by}s"] += len(numbers)
            else:
                self.emptied.append(first + document)
        if not texts:
            return tokens, offsets, n_bytes
        return self._encoded(texts, tokens, offsets, n_bytes)

    def _encoded(
        self, texts: dict[int, bytes], tokens: np.ndarray, offsets: np.ndarray, n_bytes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        encoder = self.load()
        ids, edges = encoder.encode(list(texts.values()))
        pieces, here = list[np.ndarray](), 0
        lengths, n_bytes = np.diff(offsets), n_bytes.copy()
        for number, document in enumerate(texts):
            pieces += [tokens[here : offsets[document]], ids[edges[number] : edges[number + 1]].astype(tokens.dtype)]
            here = int(offsets[document + 1])
            lengths[document], n_bytes[document] = edges[number + 1] - edges[number], len(texts[document])
        pieces.append(tokens[here:])
        encoder.recycle()
        return np.concatenate(pieces), np.concatenate([[0], np.cumsum(lengths)]), n_bytes
