"""MinHash signatures of documents, cut into bands (Broder 1997; Leskovec et al., Mining of Massive Datasets, chapter 3).

A document is the set of its n-grams of normalised words: small letters, without marks, every run of digits as 0, split at whatever is
no letter, number or mark; scripts without spaces have a word a character. Its signature is, of each of bands * rows permutations of
64-bit hashes, the smallest value; a band is the 64-bit hash of `rows` of them. Two documents of Jaccard similarity s share at least one of
14 bands of 8 with probability 1 - (1 - s^8)^14: half of them at s = 0.69, 0.92 at 0.8.

Normalisation, n-grams and bands are as datatrove's users know them. Not as there: a permutation is a multiplication by an odd number
modulo 2^64 (there, modulo 2^61 - 1, after a product that overflows), words are not split by spaCy, and 3.14 is two words, 0 0.
All documents of a batch are done at once, permutation by permutation.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from data_prep.rules import characters
from data_prep.rules.characters import LONE, SPACE, WORD
from data_prep.rules.hashing import RADIX, Hashes, hash_spans, mix, ngrams
from pipeline.config.near import NearDuplicates

GROUP_CHARACTERS = 1 << 20
_BLANK, _DIGIT, _END = ord(" "), ord("0"), ord("\n")
_DROPPED = np.uint32(0xFFFFFFFF)


class Bands:
    """Of some of the documents of a unit: those with at least one n-gram."""

    def __init__(self, documents: NDArray[np.int64], hashes: Hashes) -> None:
        self.documents = documents  # their numbers [n]
        self.hashes = hashes  # [n, bands]


def bands(texts: Sequence[str], settings: NearDuplicates) -> Bands:
    """Of documents numbered from 0."""
    documents, hashes = [np.zeros(0, np.int64)], [np.zeros((0, settings.bands), np.uint64)]
    for first, group in groups(texts):
        shingles, edges = _shingles(group, settings.n_gram)
        some = np.flatnonzero(np.diff(edges))
        if len(some):
            documents.append(some + first)
            hashes.append(hashes_of_bands(_signatures(shingles, edges[some], settings), settings))
    return Bands(np.concatenate(documents), np.concatenate(hashes))


def groups(texts: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
    """(number of its first, texts) of about GROUP_CHARACTERS each, in order; a longer text is a group by itself."""
    first = 0
    while first < len(texts):
        last, size = first, 0
        while last < len(texts) and (last == first or size + len(texts[last]) <= GROUP_CHARACTERS):
            size += len(texts[last])
            last += 1
        yield first, texts[first:last]
        first = last


def _shingles(texts: Sequence[str], n: int) -> tuple[Hashes, NDArray[np.int64]]:
    """Hashes of all n-grams, and where each text's begin [len(texts) + 1]."""
    hashes, first = word_hashes(texts)
    left = np.repeat(first[1:], np.diff(first)) - np.arange(len(hashes))
    complete = left[: max(0, len(hashes) - n + 1)] >= n
    found = mix(ngrams(hashes, n)[complete])
    return found, np.concatenate([[0], np.cumsum(np.maximum(np.diff(first) - n + 1, 0))])


def word_hashes(texts: Sequence[str]) -> tuple[Hashes, NDArray[np.int64]]:
    """Of all normalised words, and where each text's begin [len(texts) + 1]."""
    data = np.frombuffer(b"\n".join(map(normalised, texts)) + b"\n", np.uint8)
    digit = data == _DIGIT
    data = data[~np.append(False, digit[1:] & digit[:-1])]  # a run of digits is one
    inside = data > _BLANK
    edges = np.diff(inside.view(np.int8), prepend=0)
    start, stop = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    ends = np.flatnonzero(data == _END)
    return hash_spans(data.tobytes(), start, stop), np.concatenate([[0], np.searchsorted(start, ends)])


def normalised(text: str) -> bytes:
    """Words between blanks; digits are zeros."""
    if text.isascii():
        return text.encode().translate(_ascii())
    codes = np.frombuffer(unicodedata.normalize("NFD", text.lower()).encode("utf-32-le"), "<u4")
    codes = _table()[codes]
    codes = codes[codes != _DROPPED]
    alone = np.flatnonzero(characters.flags()[codes] & LONE)
    if len(alone):
        codes = np.insert(codes, np.concatenate([alone, alone + 1]), _BLANK)
    return codes.tobytes().decode("utf-32-le").encode()


def word_places(text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the words of `word_hashes` begin and end in the text itself, in characters."""
    pieces = [text] if text.isascii() else [unicodedata.normalize("NFD", character.lower()) for character in text]
    codes = np.frombuffer("".join(pieces).encode("utf-32-le"), "<u4")
    owner = np.arange(len(codes)) if text.isascii() else np.repeat(np.arange(len(text)), list(map(len, pieces)))
    codes = _table()[codes]
    kept = np.flatnonzero(codes != _DROPPED)
    codes, owner = codes[kept], owner[kept]
    inside = codes > _BLANK
    alone = inside & ((characters.flags()[codes] & LONE) != 0)
    joined = inside[1:] & inside[:-1] & ~alone[1:] & ~alone[:-1]
    starts, stops = inside.copy(), inside.copy()
    starts[1:] &= ~joined
    stops[:-1] &= ~joined
    return owner[starts], owner[stops] + 1


@cache
def _table() -> NDArray[np.uint32]:
    """Of a code point that of what it counts as."""
    flags = characters.flags()
    table = np.where((flags & WORD) == 0, _BLANK, np.arange(len(flags))).astype("<u4")
    table[flags == SPACE] = _BLANK
    for code in range(characters.LISTED):
        category = unicodedata.category(chr(code))
        if category == "Mn":
            table[code] = _DROPPED
        elif category == "Nd":
            table[code] = _DIGIT
    table.setflags(write=False)
    return table


@cache
def _ascii() -> bytes:
    table = _table()[:128].astype(np.uint8)
    upper = np.arange(ord("A"), ord("Z") + 1)
    table[upper] = upper + 32
    return table.tobytes() + bytes(128)


def _signatures(shingles: Hashes, first: NDArray[np.int64], settings: NearDuplicates) -> Hashes:
    """[bands * rows, documents]"""
    found = np.empty((settings.bands * settings.rows_per_band, len(first)), np.uint64)
    product = np.empty_like(shingles)
    for number, factor in enumerate(_factors(len(found), settings.seed)):
        np.multiply(shingles, factor, out=product)
        np.minimum.reduceat(product, first, out=found[number])
    return found


@cache
def _factors(count: int, seed: int) -> Hashes:
    """Odd, so that multiplying permutes."""
    return mix(np.arange(1, count + 1, dtype=np.uint64) * RADIX + np.uint64(seed)) | np.uint64(1)


def hashes_of_bands(signatures: Hashes, settings: NearDuplicates) -> Hashes:
    """[documents, bands] from [bands * rows, documents]."""
    rows = signatures.reshape(settings.bands, settings.rows_per_band, -1)
    return np.stack([mix(ngrams_of(band)) for band in rows], axis=1)


def ngrams_of(values: Hashes) -> Hashes:
    """The polynomial of each column [rows, n] -> [n]."""
    found = values[0].copy()
    for row in values[1:]:
        found *= RADIX
        found += row
    return found
