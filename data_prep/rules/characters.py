"""What a character is, for splitting text into words: a byte of flags for every code point."""

from __future__ import annotations

import unicodedata
from functools import cache

import numpy as np
from numpy.typing import NDArray

SPACE, ALPHA, WORD, EDGE, LONE, DASH, UPPER, LOWER = (1 << bit for bit in range(8))

LISTED = 0x32000  # the planes that hold characters; beyond them there are private ones and selectors
_INNER = frozenset("-/@\\^|~+")  # punctuation that stays with a word at its ends, as spaCy's English rules have it
_DASHES = frozenset("-–—~")
# Scripts that are written without spaces: every character is a word
_LONE = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x31FFF),
)


@cache
def flags() -> NDArray[np.uint8]:
    """Of the code points below 0x110000. SPACE: white space. ALPHA: a letter. WORD: a letter, number or mark. EDGE: punctuation that is
    split from the ends of a word. LONE: a word by itself. DASH: splits words between letters. UPPER, LOWER: as `str` has it."""
    table = np.zeros(0x110000, np.uint8)
    table[:LISTED] = [_flags_of(chr(code)) for code in range(LISTED)]
    for first, last in _LONE:
        table[first : last + 1] |= np.where(table[first : last + 1] & WORD, LONE, 0).astype(np.uint8)
    table.setflags(write=False)
    return table


def _flags_of(character: str) -> int:
    category = unicodedata.category(character)
    if character.isspace():
        return SPACE
    found = 0
    if category[0] in "LNM":
        found |= WORD | (ALPHA if category[0] == "L" else 0)
        found |= (UPPER if category == "Lu" else 0) | (LOWER if category == "Ll" else 0)
    elif (category[0] in "PC" or category in ("Sc", "So") or character in "%=§<>`") and character not in _INNER:
        found |= EDGE
    return found | (DASH if character in _DASHES else 0)
