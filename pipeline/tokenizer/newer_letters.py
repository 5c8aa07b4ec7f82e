"""Characters on which the engines disagree because they carry different Unicode tables.

gigatoken 0.10 splits text by Unicode 17, `tokenizers` 0.23 and fastokens 0.3 by Unicode 16; and where `tokenizers`
composes characters (NFC) it does so by the table of Unicode 9. So a letter that one table has and the other has not
begins a new piece here and continues one there. Documents that hold one of RANGES are encoded by an engine with the
published tokenizer's tables (`encoder.py`). RANGES may hold too many characters, at the price of speed, but not too few:
tests compare the engines on every other character.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

# First and last code point. Differences of the split and of NFC, and the blocks whose letters compose in pairs.
RANGES: tuple[tuple[int, int], ...] = (
    (0x7FD, 0x7FD), (0x88F, 0x88F), (0x897, 0x89F), (0x8CA, 0x8D3), (0x9FE, 0x9FE), (0xC3C, 0xC3C), (0xC5C, 0xC5C),
    (0xCDC, 0xCDC), (0xD3B, 0xD3C), (0xEBA, 0xEBA), (0x1715, 0x1715), (0x1ABF, 0x1AEB), (0x1DF6, 0x1DFA),
    (0xA7CB, 0xA7DC), (0xA7F1, 0xA7F1), (0xA82C, 0xA82C), (0x105C0, 0x105FF), (0x10940, 0x1095F), (0x10D24, 0x10D27),
    (0x10D40, 0x10D8F), (0x10EAB, 0x10EAC), (0x10EC2, 0x10EC7), (0x10EFA, 0x10EFF), (0x10F46, 0x10F50),
    (0x10F82, 0x10F85), (0x11070, 0x11070), (0x1133B, 0x1133B), (0x11380, 0x113FF), (0x1145E, 0x1145E),
    (0x11839, 0x1183A), (0x11900, 0x1195F), (0x119E0, 0x119E0), (0x11A34, 0x11A34), (0x11A47, 0x11A47),
    (0x11A99, 0x11A99), (0x11B60, 0x11B67), (0x11BC0, 0x11BFF), (0x11D42, 0x11D45), (0x11D97, 0x11D97),
    (0x11DB0, 0x11DEF), (0x11F41, 0x11F42), (0x16100, 0x1613F), (0x16D40, 0x16D7F), (0x16EA0, 0x16ED3),
    (0x16FF0, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E), (0x18D80, 0x18DF2), (0x1E08F, 0x1E08F),
    (0x1E130, 0x1E136), (0x1E2AE, 0x1E2AE), (0x1E2EC, 0x1E2EF), (0x1E4EC, 0x1E4EF), (0x1E5D0, 0x1E5FF),
    (0x1E6C0, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD), (0x323B0, 0x33479),
)  # fmt: skip


def holds_newer_letters(documents: Sequence[bytes]) -> np.ndarray:
    """bool [n]: which UTF-8 documents hold a character of RANGES. Most are ASCII; most others are passed over
    by five `memchr`s each."""
    leads, pairs, starts, ends = _tables()
    found = np.zeros(len(documents), bool)
    for index, document in enumerate(documents):
        if document.isascii() or not any(lead in document for lead in leads):
            continue
        text = np.frombuffer(document, np.uint8)
        at = np.flatnonzero(text >= leads[0][0])
        at = at[pairs[(text[at].astype(np.uint16) << 8) | text[at + 1]]]
        if len(at):
            points = _code_points(text, at)
            found[index] = bool((points <= ends[np.searchsorted(starts, points, side="right") - 1]).any())
    return found


def _code_points(text: np.ndarray, at: np.ndarray) -> np.ndarray:
    """int64: the characters of two to four bytes that begin at `at`, in valid UTF-8."""
    padded = np.concatenate([text, np.zeros(3, np.uint8)]).astype(np.int64)
    first, second, third, fourth = (padded[at + offset] for offset in range(4))
    two = (first & 0x1F) << 6 | second & 0x3F
    three = (first & 0x0F) << 12 | (second & 0x3F) << 6 | third & 0x3F
    four = (first & 0x07) << 18 | (second & 0x3F) << 12 | (third & 0x3F) << 6 | fourth & 0x3F
    return np.where(first >= 0xF0, four, np.where(first >= 0xE0, three, two))


@lru_cache(maxsize=1)
def _tables() -> tuple[list[bytes], np.ndarray, np.ndarray, np.ndarray]:
    """First bytes, ascending; bool [65536] of the first two bytes as a number; starts and ends of RANGES, ascending."""
    pairs = np.zeros(1 << 16, bool)
    for low, high in RANGES:
        for point in range(low, high + 1):
            first, second = chr(point).encode()[:2]
            pairs[first << 8 | second] = True
    leads = [bytes([int(first)]) for first in np.unique(np.flatnonzero(pairs) >> 8)]
    starts, ends = np.array(sorted(RANGES), np.int64).T
    return leads, pairs, starts, ends
