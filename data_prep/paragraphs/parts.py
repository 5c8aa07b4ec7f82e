"""The paragraphs or lines of a document, and the file of a unit's: hash, document and place of each, sorted by hash (hash_sorted.py).

A part is what lies between empty lines (`by: paragraph`) or line ends (`by: line`), white space at its ends not counted. Shorter ones than
`min_characters` are not looked at, which bounds the file: 24 bytes for each 50 characters of text at the most.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep import hash_sorted
from pipeline.config.paragraphs import DuplicateParagraphs

PART = np.dtype([("hash", "<u8"), ("document", "<u8"), ("ordinal", "<u4"), ("number", "<u4")])
_BETWEEN = {"paragraph": re.compile(r"(\n[^\S\n]*\n)"), "line": re.compile(r"(\n)")}


def parts(text: str, settings: DuplicateParagraphs) -> list[tuple[int, str]]:
    """(place among all parts, text without white space at its ends) of those that are long enough."""
    found = enumerate(map(str.strip, _BETWEEN[settings.by].split(text)[::2]))
    return [(number, part) for number, part in found if len(part) >= settings.min_characters]


def without(text: str, numbers: Sequence[int], settings: DuplicateParagraphs) -> str:
    """The text without the parts of these places, what parts them from the next, and white space at its ends."""
    pieces = _BETWEEN[settings.by].split(text)
    for number in numbers:
        pieces[2 * number : 2 * number + 2] = [""] * len(pieces[2 * number : 2 * number + 2])
    return "".join(pieces).strip()


class Parts:
    """What accumulates while a unit is read."""

    def __init__(self, settings: DuplicateParagraphs) -> None:
        self._settings = settings
        self._found = [np.zeros(0, PART)]
        self._count = 0

    def add(self, texts: Sequence[bytes], hashes: Sequence[bytes]) -> None:
        """The next documents, and their hashes (tokenize_unit.document_hash)."""
        for text, document in zip(texts, hashes):
            mine = parts(text.decode(), self._settings)
            found = np.empty(len(mine), PART)
            found["hash"] = [xxhash.xxh3_64_intdigest(part.encode()) for _, part in mine]
            found["document"] = int.from_bytes(document[:8], "big")
            found["ordinal"], found["number"] = self._count, [number for number, _ in mine]
            self._found.append(found)
            self._count += 1

    def to_bytes(self) -> bytes:
        records = np.concatenate(self._found)
        records = records[np.lexsort((records["number"], records["ordinal"], records["hash"]))]
        hashes: NDArray[np.uint64] = records["hash"]
        return hash_sorted.to_bytes(records, hashes)
