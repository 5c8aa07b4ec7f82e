"""Gopher's quality rules (Rae et al. 2021, arXiv 2112.11446, appendix A1.1), as datatrove's `GopherQualityFilter` counts them.

Verdicts are datatrove's where words are the same (tests/data_prep/rules/). Words are those of words.py, not spaCy's, so documents
near a threshold of a ratio to words may differ. A word of punctuation alone is one without a letter, number or mark; datatrove's
list lacks some signs (©, °). A document without words or lines fails `min_words` here; there, it raises. A limit of 0 is a limit
(datatrove switches the rule off).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_prep.rules.characters import ALPHA, WORD
from data_prep.rules.group import Group, fraction
from data_prep.rules.hashing import hash_spans
from pipeline.config.rules import GopherQuality


def verdicts(group: Group, settings: GopherQuality) -> list[str]:
    """Of each text the rule that it fails first, or ''."""
    words = group.words
    worded = (words.flags & WORD) != 0
    count = _per_text(words.first, worded)
    characters = _per_text(words.first, np.where(worded, words.size, 0))
    alphabetic = _per_text(words.first, (words.flags & ALPHA) != 0)
    every = np.diff(words.first)
    stops = _stop_words(group, settings.stop_words) if settings.min_stop_words else np.zeros(len(group), np.int64)
    facts = zip(group.texts, count.tolist(), characters.tolist(), alphabetic.tolist(), every.tolist(), stops.tolist())
    return [_verdict(settings, *fact) for fact in facts]


def _verdict(
    settings: GopherQuality, text: str, count: int, characters: int, alphabetic: int, every: int, stops: int
) -> str:
    if count < settings.min_words or not count:
        return "min_words"
    if count > settings.max_words:
        return "max_words"
    if characters / count < settings.min_mean_word_length:
        return "min_mean_word_length"
    if characters / count > settings.max_mean_word_length:
        return "max_mean_word_length"
    if text.count("#") / every > settings.max_symbol_word_ratio:
        return "max_symbol_word_ratio"
    ellipses = text.count("...") + text.count("…")
    if ellipses / every > settings.max_symbol_word_ratio:
        return "max_symbol_word_ratio"
    # a line that begins or ends so has such a sign: where there are too few of them, nobody counts lines
    ends = text.count("\n")
    bullets = text.count("•") + text.count("-")
    if bullets and bullets > settings.max_bullet_line_fraction * ends:
        lines = text.splitlines()
        bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
        if fraction(bullets, len(lines)) > settings.max_bullet_line_fraction:
            return "max_bullet_line_fraction"
    if ellipses and ellipses > settings.max_ellipsis_line_fraction * ends:
        lines = text.splitlines()
        trailing = sum(line.rstrip().endswith(("...", "…")) for line in lines)
        if fraction(trailing, len(lines)) > settings.max_ellipsis_line_fraction:
            return "max_ellipsis_line_fraction"
    if alphabetic / every < settings.min_alphabetic_word_fraction:
        return "min_alphabetic_word_fraction"
    return "min_stop_words" if stops < settings.min_stop_words else ""


def _stop_words(group: Group, stop_words: tuple[str, ...]) -> NDArray[np.int64]:
    """How many of them there are in each text. They are compared by hash."""
    found = np.zeros(len(group), np.int64)
    for word in {word.encode() for word in stop_words if word}:
        (wanted,) = hash_spans(word, np.zeros(1, np.int64), np.full(1, len(word)))
        places = np.flatnonzero(group.hashes == wanted)
        found[np.unique(np.searchsorted(group.words.first, places, side="right") - 1)] += 1
    return found


def _per_text(first: NDArray[np.int64], values: NDArray[np.int64 | np.bool_]) -> NDArray[np.int64]:
    """Sums over the words of each text."""
    sums = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=sums[1:])
    return np.diff(sums[first])
