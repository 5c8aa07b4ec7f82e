"""The order of pipeline/dataset/order.py, written down once more: one sequence at a time, integers and loops only.

Slow and plain on purpose: the fast code is compared with it. The mixture is replayed from the start of training, position
by position, instead of being computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def fmix64(x: int) -> int:
    x = (x ^ (x >> 33)) * 0xFF51AFD7ED558CCD & MASK
    x = (x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53 & MASK
    return x ^ (x >> 33)


def key_of(*parts: int | str) -> int:
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def subkey(key: int, value: int) -> int:
    return fmix64(key ^ fmix64((value + 1) * GOLDEN & MASK))


def permute(x: int, n: int, key: int) -> int:
    bits = (n - 1).bit_length()
    low_bits = bits // 2
    high_bits = bits - low_bits
    while True:
        low, high = x % 2**low_bits, x // 2**low_bits
        for number in range(6):
            round_key = (key + (number + 1) * GOLDEN) & MASK
            if number % 2:
                low ^= fmix64(high ^ round_key) % 2**low_bits
            else:
                high ^= fmix64(low ^ round_key) % 2**high_bits
        x = high * 2**low_bits + low
        if x < n:
            return x


@dataclass(frozen=True)
class Constants:
    names: list[str]
    rows: list[int]
    stages: list[tuple[list[int], int | None]]  # (weights, end in lane positions)
    lanes: int
    group: int
    window: int
    block: int
    seed: int


def rounded(weights: list[int], total: int) -> list[int]:
    """Largest remainder, in integers."""
    whole = sum(weights)
    counts = [weight * total // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda s: (-(weights[s] * total % whole), s))
    for s in by_remainder[: total - sum(counts)]:
        counts[s] += 1
    return counts


def blocks_of(constants: Constants) -> Iterator[tuple[int, int, int, list[int]]]:
    """Mixture blocks in order: start of their run of equal blocks, number in it, size, counts."""
    position = 0
    for weights, end in constants.stages:
        start, number = position, 0
        while end is None or position < end:
            size = constants.block
            if end is not None and end - position < size:
                size = end - position
                start, number = position, 0
            yield start, number, size, rounded(weights, size)
            position += size
            number += 1


def rows_in_order(constants: Constants) -> Iterator[tuple[int, int, int]]:
    """(source, row, epoch) of row positions 0, 1, 2, ..."""
    lanes, group = constants.lanes, constants.group
    used = [[0] * len(constants.names) for _ in range(lanes)]
    for start, number, size, counts in blocks_of(constants):
        slots = [s for s, count in enumerate(counts) for _ in range(count)]
        key = key_of(constants.seed, "mixture", start, number)
        pattern = [slots[permute(t, size, key)] for t in range(size)]
        stride = max(1, size // lanes)
        for i in range(size):
            for lane in range(lanes):
                s = pattern[(lane * stride + i) % size]
                v = used[lane][s]
                used[lane][s] += 1
                yield s, *row_of(constants, s, lane, v, group)


def row_of(constants: Constants, s: int, lane: int, v: int, group: int) -> tuple[int, int]:
    rows = constants.rows[s]
    divisors = [d for d in range(1, constants.lanes + 1) if constants.lanes % d == 0]
    lanes = max((d for d in divisors if rows // d >= group), default=1)
    v, lane = v * (constants.lanes // lanes) + lane // lanes, lane % lanes
    lane_rows = rows // lanes
    epoch, v = v // lane_rows, v % lane_rows

    first = lane * lane_rows
    shift = lane % constants.window * group
    window = (first + v + shift) // (constants.window * group)
    members = [x for x in range(first, first + lane_rows) if (x + shift) // (constants.window * group) == window]
    key = subkey(subkey(subkey(key_of(constants.seed, "windows", constants.names[s]), epoch), lane), window)
    x = members[permute(first + v - members[0], len(members), key)]

    key = subkey(key_of(constants.seed, "blocks", constants.names[s]), epoch)
    return permute(x // group, rows // group, key) * group + x % group, epoch
