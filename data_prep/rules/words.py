"""Words of many documents at once, as arrays.

What a word is follows spaCy's English tokenizer, which datatrove counts with, by few rules: what lies between white space,
without the punctuation at its ends, of which every character is a word of its own (a run of full stops is one word). Inside,
words are cut at hyphens, dashes and commas between letters, at `: < > = /` before a letter, at a full stop between a small
letter and a capital, at operators between digits, at runs of full stops, and before `'s 'm 'd 'll 're 've n't`. spaCy's lists
are not followed: abbreviations and emoticons (`U.S.`, `e.g.`, `:-)`), units after numbers (`10km`), addresses (`https://...` is one
word there). Scripts that are written without spaces (Han, kana, Thai, ...) have a word a character.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.rules import characters
from data_prep.rules.characters import ALPHA, DASH, EDGE, LONE, LOWER, SPACE, UPPER, WORD
from data_prep.rules.hashing import Hashes, hash_spans

GROUP_CHARACTERS = 1 << 20  # texts that are looked at together: arrays that fit into a processor's cache
_ENDINGS = ("s", "m", "d", "ll", "re", "ve")  # after an apostrophe


class Words:
    """The words of several texts. Word i is of characters [start[i], stop[i]) of the joined texts; those of text t are words
    [first[t], first[t + 1])."""

    def __init__(self, texts: Sequence[str]) -> None:
        joined = "\n".join(texts)
        self.lengths = np.fromiter(map(len, texts), np.int64, len(texts))  # of the texts, in characters
        self._ascii = joined.isascii()
        self._bytes = joined.encode()
        codes = (
            np.frombuffer(self._bytes, np.uint8) if self._ascii else np.frombuffer(joined.encode("utf-32-le"), "<u4")
        )
        self._codes = codes
        flags = characters.flags()[codes] if len(codes) else np.zeros(0, np.uint8)
        begins = _begins(codes, flags)
        space = (flags & SPACE) != 0
        self.start = np.flatnonzero(begins)
        ends = np.zeros(len(codes) + 1, bool)
        ends[1:] = ~space
        ends[:-1] &= space | begins
        self.stop = np.flatnonzero(ends)
        # white space behind a word adds no flag that is asked for
        self.flags = np.bitwise_or.reduceat(flags, self.start) if len(self.start) else flags[:0]
        edges = np.concatenate([[0], np.cumsum(self.lengths + 1)])
        self.first = np.searchsorted(self.start, edges)
        self.size = self.stop - self.start

    def __len__(self) -> int:
        return len(self.start)

    def hashes(self) -> Hashes:
        """Equal for equal words, whatever the texts around them."""
        start, stop = self.start, self.stop
        if not self._ascii:
            width = 1 + sum((self._codes >= limit).astype(np.uint8) for limit in (0x80, 0x800, 0x10000))
            at = np.concatenate([[0], np.cumsum(width, dtype=np.int64)])
            start, stop = at[start], at[stop]
        return hash_spans(self._bytes, start, stop)

    def texts(self, number: int) -> list[str]:
        """The words of text `number`, for people and tests."""
        joined = self._bytes.decode()
        span = slice(self.first[number], self.first[number + 1])
        return [joined[start:stop] for start, stop in zip(self.start[span].tolist(), self.stop[span].tolist())]


def groups(texts: Sequence[str]) -> Iterator[list[int]]:
    """Numbers of texts that are looked at together: those of ASCII alone apart, for they take a quarter of the memory."""
    for ascii_only in (True, False):
        group, size = list[int](), 0
        for number, text in enumerate(texts):
            if text.isascii() is ascii_only:
                if group and size + len(text) > GROUP_CHARACTERS:
                    yield group
                    group, size = [], 0
                group.append(number)
                size += len(text)
        if group:
            yield group


def _begins(codes: NDArray[np.uint8 | np.uint32], flags: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where a word begins."""
    count = len(codes)
    single = (flags & LONE) != 0
    symbols = np.flatnonzero((flags & (SPACE | WORD)) == 0)
    own = _at_edges(flags, symbols) | _inside(codes, flags, symbols)
    single[symbols[own]] = True
    space = (flags & SPACE) != 0
    begins = ~space
    after = np.ones(count, bool)
    after[1:] = space[:-1] | single[:-1]
    begins &= single | after
    dots = symbols[codes[symbols] == ord(".")]
    dots = dots[dots > 0]
    begins[dots[codes[dots - 1] == ord(".")]] = False
    begins[_contractions(codes, flags, symbols)] = True
    return begins


def _at_edges(flags: NDArray[np.uint8], symbols: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Of the symbols, those in runs of EDGE characters that begin or end at white space."""
    edge = (flags[symbols] & EDGE) != 0
    places = symbols[edge]
    own = np.zeros(len(symbols), bool)
    if len(places):
        breaks = np.flatnonzero(np.diff(places) != 1) + 1
        first = np.concatenate([[0], breaks])
        last = np.concatenate([breaks, [len(places)]]) - 1
        touching = _space_at(flags, places[first] - 1) | _space_at(flags, places[last] + 1)
        own[edge] = np.repeat(touching, last - first + 1)
    return own


def _space_at(flags: NDArray[np.uint8], places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Also before the first and after the last character."""
    inside = (places >= 0) & (places < len(flags))
    return ~inside | ((flags[np.where(inside, places, 0)] & SPACE) != 0)


def _inside(
    codes: NDArray[np.uint8 | np.uint32], flags: NDArray[np.uint8], symbols: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Of the symbols, those that cut the word they are in."""
    own = np.zeros(len(symbols), bool)
    inner = (symbols > 0) & (symbols < len(codes) - 1)
    at = symbols[inner]
    code, before, after = codes[at], flags[at - 1], flags[at + 1]
    letters = ((before & after) & ALPHA) != 0
    cut = letters & (((flags[at] & DASH) != 0) | (code == ord(",")))
    cut |= np.isin(code, [ord(symbol) for symbol in ":<>=/"]) & ((before & WORD) != 0) & ((after & ALPHA) != 0)
    dot = code == ord(".")
    cut |= dot & (
        (((before & LOWER) != 0) & ((after & UPPER) != 0)) | (codes[at - 1] == code) | (codes[at + 1] == code)
    )
    digit = _is_digit(codes[at - 1]) & (_is_digit(codes[at + 1]) | (codes[at + 1] == ord("-")))
    cut |= np.isin(code, [ord(symbol) for symbol in "+-*^"]) & digit
    own[inner] = cut
    return own


def _is_digit(codes: NDArray[np.uint8 | np.uint32]) -> NDArray[np.bool_]:
    return (codes >= ord("0")) & (codes <= ord("9"))


def _contractions(
    codes: NDArray[np.uint8 | np.uint32], flags: NDArray[np.uint8], symbols: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Where `'s`, `'ll`, `n't` and their like begin."""
    at = symbols[(codes[symbols] == ord("'")) | (codes[symbols] == ord("’"))]
    at = at[(at > 1) & (at < len(codes) - 1)]
    at = at[(flags[at - 1] & flags[at + 1] & ALPHA) != 0]
    found = []
    for ending in _ENDINGS:
        here = at[_reads(codes, at + 1, ending)]
        found.append(here[_no_word_at(flags, here + 1 + len(ending))])
    not_ = at[_reads(codes, at + 1, "t") & ((codes[at - 1] | 32) == ord("n")) & ((flags[at - 2] & ALPHA) != 0)]
    found.append(not_[_no_word_at(flags, not_ + 2)] - 1)
    return np.concatenate(found)


def _reads(codes: NDArray[np.uint8 | np.uint32], places: NDArray[np.int64], text: str) -> NDArray[np.bool_]:
    """Whether the characters from each place on are `text`, in whatever case (which is of ASCII letters)."""
    inside = places + len(text) <= len(codes)
    found = inside.copy()
    for offset, character in enumerate(text):
        found &= (codes[np.where(inside, places + offset, 0)] | 32) == ord(character)
    return found


def _no_word_at(flags: NDArray[np.uint8], places: NDArray[np.int64]) -> NDArray[np.bool_]:
    inside = places < len(flags)
    return ~inside | ((flags[np.where(inside, places, 0)] & WORD) == 0)
