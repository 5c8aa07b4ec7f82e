"""Files of records sorted by a 64-bit hash, of which a range of leading hash bytes is read by itself and checked.

Little-endian: HEAD (257 uint32, the first record of each leading byte, then the count; 256 uint64, xxh3 of the records of each leading byte;
xxh3 of both), then the records.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.integrity import DamagedFile
from pipeline.storage import Storage

MEND = "restore it from a copy, or delete it and the record of what made it (datasets/units) and prepare again"
HEAD = np.dtype([("first", "<u4", 257), ("xxh3", "<u8", 256), ("own", "<u8")])


def to_bytes(records: NDArray[np.void], hashes: NDArray[np.uint64]) -> bytes:
    """`hashes`: of the records, ascending."""
    first, digests = by_leading_byte(records, hashes)
    head = first.astype("<u4").tobytes() + np.array(digests, "<u8").tobytes()
    return head + xxhash.xxh3_64_intdigest(head).to_bytes(8, "little") + records.tobytes()


def by_leading_byte(records: NDArray[np.void], hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int64], list[int]]:
    """The first record of each leading byte of the hashes, which ascend, and the count; xxh3 of the records of each."""
    first = np.searchsorted(hashes >> np.uint64(56), np.arange(257, dtype=np.uint64))
    return first, [xxhash.xxh3_64_intdigest(records[start:stop].tobytes()) for start, stop in pairwise(first.tolist())]


def changed(
    data: bytes, size: int, first: Sequence[int], digests: Sequence[int], low: int = 0, high: int = 256
) -> int | None:
    """The least leading byte of [low, high) whose records of `size` bytes, all of which `data` should be, are not as they were written."""
    for byte in range(low, high):
        start, stop = ((first[edge] - first[low]) * size for edge in (byte, byte + 1))
        if stop > len(data) or xxhash.xxh3_64_intdigest(data[start:stop]) != digests[byte]:
            return byte
    return None


def read(storage: Storage, path: str, kind: np.dtype[np.void], low: int = 0, high: int = 256) -> NDArray[np.void]:
    """Records whose leading hash byte is in [low, high). Raises DamagedFile."""
    with storage.open(path) as file:
        data = file.read(HEAD.itemsize)
        if len(data) < HEAD.itemsize or xxhash.xxh3_64_intdigest(data[:-8]) != int.from_bytes(data[-8:], "little"):
            raise DamagedFile(f"{storage.uri(path)}: its head is torn or changed; {MEND}")
        (head,) = np.frombuffer(data, HEAD)
        first = [int(number) for number in head["first"]]
        file.seek(HEAD.itemsize + first[low] * kind.itemsize)
        data = file.read((first[high] - first[low]) * kind.itemsize)
    if (byte := changed(data, kind.itemsize, first, head["xxh3"], low, high)) is not None:
        raise DamagedFile(f"{storage.uri(path)}: records with the leading byte {byte:02x} are torn or changed; {MEND}")
    return np.frombuffer(data, kind)
