"""Gopher's repetition rules (Rae et al. 2021, arXiv 2112.11446, table A1), as datatrove's `GopherRepetitionFilter` counts them.

Verdicts are datatrove's where words are the same (tests/data_prep/rules/); words are those of words.py, not spaCy's.

n-grams are compared by hash, 40 bits and more of it. Of all n-grams of a group of texts (hash, place) are sorted at once, so
repeated ones lie together, first of all the first. Few texts come near a threshold; for these alone the walk of duplicate n-grams
is made, which after a repeated n-gram goes on behind it. An n-gram can only be repeated where its first n - 1 words are, so from 3 on
only these places are looked at.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_prep.rules.group import Group, fraction
from data_prep.rules.hashing import RADIX, mix, powers
from pipeline.config.rules import GopherRepetition

TOP, DUPLICATE = (2, 3, 4), (5, 6, 7, 8, 9, 10)

Places = NDArray[np.int64]


def verdicts(group: Group, settings: GopherRepetition) -> list[str]:
    """Of each text the rule that it fails first, or ''."""
    found = [_by_lines(text, settings) for text in group.texts]
    if not all(found):
        grams = _Grams(group)
        for n in TOP:
            _mark(found, grams.top(n, settings.top(n)), f"max_top_{n}_gram_character_fraction")
        for n in DUPLICATE:
            passing = np.array([not name for name in found])
            _mark(
                found, grams.duplicate(n, settings.duplicate(n), passing), f"max_duplicate_{n}_gram_character_fraction"
            )
    return found


def _mark(found: list[str], failing: list[int], name: str) -> None:
    for number in failing:
        found[number] = found[number] or name


def _by_lines(text: str, settings: GopherRepetition) -> str:
    paragraphs = _paragraphs(text)
    count, characters = duplicates(paragraphs)
    if count / len(paragraphs) > settings.max_duplicate_paragraph_fraction:
        return "max_duplicate_paragraph_fraction"
    if fraction(characters, len(text)) > settings.max_duplicate_paragraph_character_fraction:
        return "max_duplicate_paragraph_character_fraction"
    lines = _lines(text)
    count, characters = duplicates(lines)
    if count / len(lines) > settings.max_duplicate_line_fraction:
        return "max_duplicate_line_fraction"
    if fraction(characters, len(text)) > settings.max_duplicate_line_character_fraction:
        return "max_duplicate_line_character_fraction"
    return ""


def _paragraphs(text: str) -> list[str]:
    """re.split(r"\\n{2,}", text.strip())"""
    text = text.strip()
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.split("\n\n")


def _lines(text: str) -> list[str]:
    """re.split(r"\\n+", text)"""
    lines = list(filter(None, text.split("\n")))
    return [""] * text.startswith("\n") + lines + [""] * text.endswith("\n") if text else [""]


def duplicates(parts: list[str]) -> tuple[int, int]:
    """How many equal an earlier one, and their characters."""
    unique = set(parts)
    if len(unique) == len(parts):
        return 0, 0
    return len(parts) - len(unique), sum(map(len, parts)) - sum(map(len, unique))


class _Grams:
    """The n-grams of a group of texts that are there more than once in theirs, n growing from call to call."""

    def __init__(self, group: Group) -> None:
        words = group.words
        self._words, self._first = group.hashes, words.first
        self._powers, inverse = powers(len(self._words))
        self._sums = np.zeros(
            len(self._words) + 1, np.uint64
        )  # an n-gram's hash is a difference of two, moved to one place
        np.cumsum(self._words * inverse, out=self._sums[1:])
        self._text = np.repeat(np.arange(len(group)), np.diff(words.first))
        self._salt = mix(np.arange(1, len(group) + 1, dtype=np.uint64) * RADIX)[
            self._text
        ]  # n-grams of two texts differ
        self._left = words.first[1:][self._text] - np.arange(len(self._words))  # words from here to the text's end
        self._characters = np.concatenate([[0], np.cumsum(words.size)])
        self._lengths = words.lengths
        self._repeated: Places | None = None  # where a repeated n-gram of the last n begins, ascending; None: anywhere

    def top(self, n: int, limit: float) -> list[int]:
        """Texts of whose characters more than the limit are those of their most frequent n-gram (of several, the first one)."""
        places, begins, count = self._repetitions(n)
        place = places[begins]
        size = self._size(place, n) + n - 1  # joined by spaces
        text = self._text[place]
        failing = []
        for number in np.unique(text[count * size > limit * self._lengths[text]]).tolist():
            own = np.flatnonzero(text == number)
            most = own[count[own] == count[own].max()]
            best = most[np.argmin(place[most])]
            if count[best] * size[best] / self._lengths[number] > limit:
                failing.append(number)
        once = np.flatnonzero(np.diff(self._first) >= n)  # where nothing is repeated, the first one
        once = once[np.bincount(text, minlength=len(self._lengths))[once] == 0]
        size = self._size(self._first[once], n) + n - 1
        return failing + once[size / self._lengths[once] > limit].tolist()

    def duplicate(self, n: int, limit: float, passing: NDArray[np.bool_]) -> list[int]:
        """Of the passing texts those of whose characters more than the limit are in repeated n-grams that do not overlap."""
        places, begins, count = self._repetitions(n)
        later = np.ones(len(places), bool)
        later[begins] = False
        repeats = np.sort(places[later])
        # what repeats cover is the most that the walk can count
        stops = np.minimum(repeats + n, np.append(repeats[1:], len(self._words)))
        covered = self._characters[stops] - self._characters[repeats]
        most = np.bincount(self._text[repeats], covered, len(self._lengths))
        near = passing & (most > limit * self._lengths)
        if not near.any():
            return []
        group = np.repeat(np.arange(len(begins)), count)
        own = np.flatnonzero(near[self._text[places]])
        own = own[np.argsort(places[own])]
        places, group = places[own], group[own]
        failing = []
        for number in np.flatnonzero(near).tolist():
            low, high = np.searchsorted(places, self._first[number : number + 2])
            length = int(self._lengths[number])
            if self._walk(places[low:high], group[low:high].tolist(), n, limit, length):
                failing.append(number)
        return failing

    def _walk(self, places: Places, groups: list[int], n: int, limit: float, length: int) -> bool:
        """Whether more than the limit of a text is in repeated n-grams; only those count as seen that the walk has come by."""
        seen = set()
        characters, here = 0, 0
        for place, group, size in zip(places.tolist(), groups, self._size(places, n).tolist()):
            if place >= here:
                if group in seen:
                    characters += size
                    here = place + n
                    if characters / length > limit:
                        return True
                else:
                    seen.add(group)
        return False

    def _repetitions(self, n: int) -> tuple[Places, Places, Places]:
        """Places of repeated n-grams, those of equal ones together and ascending; where each n-gram's begin, and how many they are."""
        if self._repeated is None:
            places = np.flatnonzero(self._left >= n)
        else:
            places = self._repeated[self._left[self._repeated] >= n]
        hashes = (self._sums[places + n] - self._sums[places]) * self._powers[places]
        bits = np.uint64(len(self._words).bit_length())
        keys = (hashes ^ self._salt[places]) >> bits << bits | places.astype(np.uint64)
        keys.sort()
        same = keys[1:] >> bits == keys[:-1] >> bits
        again = np.zeros(len(keys), bool)
        again[:-1] |= same
        again[1:] |= same
        first = np.flatnonzero(~np.append(False, same)[: len(keys)][again])
        places = (keys[again] & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
        self._repeated = np.sort(places)
        return places, first, np.diff(np.append(first, len(places)))

    def _size(self, places: Places, n: int) -> Places:
        return self._characters[places + n] - self._characters[places]
