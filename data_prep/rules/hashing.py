"""64-bit hashes of many short byte strings at once, and of runs of them (n-grams), in numpy.

A word is read in pieces of 8 bytes that are mixed in one after the other (multiply, shift, exclusive or), as wyhash and its
kin do; most words are one piece. An n-gram's hash is a polynomial in its words' hashes, modulo 2^64. Not meant against an
adversary.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import xxhash
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
PIECE = 8
LONG = 64  # bytes: longer words are hashed one by one
RADIX = np.uint64(0x9E3779B97F4A7C15)
SUMMED_FROM = 6  # words of an n-gram
POWERS = 1 << 18  # words at a time, of which prefix sums are made
_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)
_LENGTH = np.uint64(0xA0761D6478BD642F)
_MASKS = np.array([(1 << 8 * size) - 1 for size in range(PIECE + 1)], np.uint64)
_SHIFT = np.uint64(32)


def hash_spans(data: bytes, start: NDArray[np.int64], stop: NDArray[np.int64]) -> Hashes:
    """Of data[start:stop] for each pair, which is not empty."""
    padded = np.frombuffer(data + bytes(PIECE), np.uint8)
    pieces = np.ndarray((len(data) + 1,), "<u8", padded, strides=(1,))
    length = stop - start
    hashes = mix((pieces[start] & _MASKS[np.minimum(length, PIECE)]) ^ (length.astype(np.uint64) * _LENGTH))
    more = np.flatnonzero(length > PIECE)
    done = PIECE
    while len(more) and done < LONG:
        left = np.minimum(length[more] - done, PIECE)
        hashes[more] = mix((hashes[more] * RADIX) ^ (pieces[start[more] + done] & _MASKS[left]))
        done += PIECE
        more = more[length[more] > done]
    view = memoryview(data)
    for word in more.tolist():
        hashes[word] = xxhash.xxh3_64_intdigest(view[start[word] : stop[word]])
    return hashes


def mix(values: Hashes) -> Hashes:
    """A bijection after which every bit depends on every other. Works in place."""
    for _ in range(2):
        values ^= values >> _SHIFT
        values *= _MULTIPLIER
    values ^= values >> _SHIFT
    return values


def ngrams(words: Hashes, n: int) -> Hashes:
    """Of each run of n words: [len(words) - n + 1], or none.

    Long runs by prefix sums: the sum of word_j * RADIX^-j up to a run's end, less that up to its beginning, times the power that moves it
    to its place (RADIX is odd, so it has an inverse modulo 2^64). Four passes for any n.
    """
    if len(words) < n:
        return words[:0]
    if n < SUMMED_FROM or len(words) > POWERS:
        found = words[: len(words) - n + 1].copy()
        for place in range(1, n):
            found *= RADIX
            found += words[place : len(words) - n + 1 + place]
        return found
    forth, back = powers(len(words))
    sums = np.cumsum(words * back, dtype=np.uint64)
    found = sums[n - 1 :].copy()
    found[1:] -= sums[: len(words) - n]
    found *= forth[n - 1 :]
    return found


def powers(count: int) -> tuple[Hashes, Hashes]:
    """RADIX^i and RADIX^-i for i below `count`."""
    if count > POWERS:
        return _powers(count)
    found, inverse = _kept_powers()
    return found[:count], inverse[:count]


@cache
def _kept_powers() -> tuple[Hashes, Hashes]:
    return _powers(POWERS)


def _powers(count: int) -> tuple[Hashes, Hashes]:
    steps = np.empty((2, count), np.uint64)
    steps[:, 0], steps[0, 1:], steps[1, 1:] = 1, RADIX, pow(int(RADIX), -1, 1 << 64)
    found, inverse = np.multiply.accumulate(steps, axis=1, dtype=np.uint64)
    return found, inverse
