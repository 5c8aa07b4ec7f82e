"""The units of a plan, each a compressed line of JSON: a million slices take 100 MB where objects would take a gigabyte.

In storage: for each unit the length of its compressed line and of the line itself (4 bytes each, little-endian), then a
zstd frame of `{"id": ..., "source": ..., "slices": [{"path": ...}, ...], "generation": ...}`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import overload

import orjson
import pyarrow as pa

from data_prep.plan import Unit


class Units(Sequence[Unit]):
    """In order of precedence within a source. A unit is unpacked when it is asked for; ids, sources, generations are at hand."""

    def __init__(self, units: Iterable[Unit] = ()) -> None:
        self.ids: list[str] = []
        self.sources: list[str] = []
        self.generations: list[int] = []
        self.packed: list[bytes] = []  # length of the line, compressed line: what a task is sent
        for unit in units:
            line = orjson.dumps(unit)
            packed = len(line).to_bytes(4, "little") + _zstd().compress(line, asbytes=True)
            self._add(packed, unit.id, unit.source, unit.generation)

    def _add(self, packed: bytes, unit_id: str, source: str, generation: int) -> None:
        self.ids.append(unit_id)
        self.sources.append(self.sources[-1] if self.sources and self.sources[-1] == source else source)  # one object
        self.generations.append(generation)
        self.packed.append(packed)

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Unit]:
        return map(unpacked, self.packed)

    @overload
    def __getitem__(self, index: int) -> Unit: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Unit]: ...
    def __getitem__(self, index: int | slice) -> Unit | Sequence[Unit]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return unpacked(self.packed[index])

    def of(self, source: str) -> list[int]:
        """Places of a source's units."""
        return [place for place, name in enumerate(self.sources) if name == source]

    def to_bytes(self) -> bytes:
        return b"".join((len(packed) - 4).to_bytes(4, "little") + packed for packed in self.packed)

    @classmethod
    def from_bytes(cls, data: bytes) -> Units:
        """Of what `to_bytes` gave; compare its digest before."""
        units, position = cls(), 0
        while position < len(data):
            end = position + 8 + int.from_bytes(data[position : position + 4], "little")
            packed = data[position + 4 : end]
            value = orjson.loads(_line(packed))
            units._add(packed, value["id"], value["source"], value["generation"])
            position = end
        return units


def unpacked(packed: bytes) -> Unit:
    return Unit.from_json(orjson.loads(_line(packed)))


def _line(packed: bytes) -> bytes:
    line: bytes = _zstd().decompress(memoryview(packed)[4:], int.from_bytes(packed[:4], "little"), asbytes=True)
    return line


@cache
def _zstd() -> pa.Codec:
    return pa.Codec("zstd", 1)
