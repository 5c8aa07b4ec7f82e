"""Language-independent document filters. A rejected document is counted under the name of the first filter it fails.

Exact duplicates are not decided here: that takes all units of a source (`resolve.py`).
"""

from __future__ import annotations

import re

from pipeline.config.schema import FilterConfig
from pipeline.tokenizer.chat import said

_ASCII_ALPHANUMERIC = bytes(byte for byte in range(128) if chr(byte).isalnum())
_OF_TEXT = ("min_characters", "max_characters", "max_repeated_line_fraction", "min_alphanumeric_fraction")
_NON_ASCII = re.compile(r"[^\x00-\x7f]+")


def rejected_by(text: bytes, config: FilterConfig, *, conversation: bool = False) -> str | None:
    """The name of the filter that rejects a document (valid UTF-8, not empty), or None. Costs nothing at the defaults.

    `conversation`: the text is one as JSON, of which what is said is judged.
    """
    if conversation and judges_text(config):
        text = said(text).encode()
    if config.min_characters > 1 or len(text) > config.max_characters:
        characters = _characters(text)
        if characters < config.min_characters:
            return "min_characters"
        if characters > config.max_characters:
            return "max_characters"
    if config.max_repeated_line_fraction < 1.0 and repeated_line_fraction(text) > config.max_repeated_line_fraction:
        return "max_repeated_line_fraction"
    if config.min_alphanumeric_fraction > 0.0 and alphanumeric_fraction(text) < config.min_alphanumeric_fraction:
        return "min_alphanumeric_fraction"
    return None


def judges_text(config: FilterConfig) -> bool:
    """Whether any filter looks at the text at all, beyond what nobody has set."""
    usual = FilterConfig()
    return any(getattr(config, name) != getattr(usual, name) for name in _OF_TEXT)


def repeated_line_fraction(text: bytes) -> float:
    """Share of the non-blank lines (blanks at both ends stripped) that equal an earlier line of the document."""
    lines = [line for line in map(bytes.strip, text.split(b"\n")) if line]
    return 1.0 - len(set(lines)) / len(lines) if lines else 0.0


def alphanumeric_fraction(text: bytes) -> float:
    """Share of the characters that are letters or digits in Unicode's sense (`str.isalnum`)."""
    others = text.translate(None, delete=_ASCII_ALPHANUMERIC)
    if text.isascii():
        return 1.0 - len(others) / len(text)
    decoded = text.decode()
    alphanumeric = len(text) - len(others)  # the ASCII ones
    alphanumeric += sum(sum(map(str.isalnum, run)) for run in _NON_ASCII.findall(decoded))
    return alphanumeric / len(decoded)


def _characters(text: bytes) -> int:
    return len(text) if text.isascii() else len(text.decode())
