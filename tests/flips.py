"""Random flipped bits in a stored file: each must be refused by a message with the file's name."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest


def check_flips(
    path: Path,
    read: Callable[[], object],
    count: int,
    harmless: Callable[[bytes, int], bool] = lambda data, byte: False,
) -> list[str]:
    """`read` reads the file as the program does, and raises ValueError for every one of `count` flips; what it said.

    `harmless(whole, byte)`: bytes that hold no content, such as white space between fields of JSON.
    """
    whole, rng, said = path.read_bytes(), random.Random(count), []
    read()
    for _ in range(count):
        bit = rng.randrange(8 * len(whole))
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(data))
        try:
            if harmless(whole, bit // 8):
                with contextlib.suppress(ValueError):
                    read()
                continue
            with pytest.raises(ValueError) as refusal:
                read()
            assert path.name in str(refusal.value), f"bit {bit}: {refusal.value}"
            said.append(str(refusal.value))
        finally:
            path.write_bytes(whole)
    return said


def is_blank(data: bytes, byte: int) -> bool:
    """White space between fields of JSON is no content."""
    return data[byte : byte + 1].isspace()
