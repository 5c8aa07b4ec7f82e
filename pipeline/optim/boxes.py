"""Boxes: which region of a parameter a rank stores, as arithmetic on the global shape and the mesh.

A *box* is a region of a tensor, one (start, stop) per dim. A `Layout` is a global shape together with how each mesh axis
cuts it; it numbers ranks row-major and follows `torch.chunk` (ceil(n / parts) elements each, then a short chunk, then
empty ones), as DTensor and FSDP2 do. Two axes may cut one dim one after the other: expert parallelism cuts a stack
first and FSDP2 cuts the rest, although its axis stands to the left (DTensor writes that as `_StridedShard`).

No tensors, no process groups: the same code serves a real mesh and a fake one of any size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Layout:
    """A global shape and how a mesh cuts it."""

    shape: tuple[int, ...]
    axes: tuple[tuple[str, int], ...] = ()  # mesh axes (name, size), outermost first
    dims: tuple[int | None, ...] = ()  # tensor dim that each axis cuts; None: replicated along the axis
    order: tuple[int, ...] = ()  # axes (indices) in the order in which they cut; matters where two cut one dim

    @property
    def world(self) -> int:
        return math.prod(size for _, size in self.axes)

    def coordinates(self, rank: int) -> tuple[int, ...]:
        found = []
        for _, size in reversed(self.axes):
            rank, coordinate = divmod(rank, size)
            found.append(coordinate)
        return tuple(reversed(found))

    def rank(self, coordinates: Sequence[int]) -> int:
        rank = 0
        for (_, size), coordinate in zip(self.axes, coordinates, strict=True):
            rank = rank * size + coordinate
        return rank

    def box(self, coordinates: Sequence[int]) -> Box:
        """Region stored at these mesh coordinates."""
        box = [(0, n) for n in self.shape]
        for axis in self.cut_order:
            dim = self.dims[axis]
            assert dim is not None
            start, stop = box[dim]
            first, last = chunk(stop - start, self.axes[axis][1], coordinates[axis])
            box[dim] = (start + first, start + last)
        return tuple(box)

    @property
    def cut_order(self) -> tuple[int, ...]:
        """Axes (indices) that cut a dim, in the order in which they do."""
        return tuple(a for a in self.order or range(len(self.axes)) if self.dims[a] is not None)

    @property
    def replicas(self) -> tuple[int, ...]:
        """Axes (indices) along which the parameter is replicated."""
        return tuple(a for a, (_, size) in enumerate(self.axes) if self.dims[a] is None and size > 1)

    def axis(self, name: str) -> int:
        return next(index for index, (found, _) in enumerate(self.axes) if found == name)

    def replica_ranks(self, coordinates: Sequence[int]) -> list[int]:
        """Ranks that store the same box, in replica order."""
        free = [range(size) if self.dims[a] is None else (coordinates[a],) for a, (_, size) in enumerate(self.axes)]
        return [self.rank(found) for found in itertools.product(*free)]

    def group(self, axis: str | None, coordinates: Sequence[int]) -> tuple[int | None, ...]:
        """Names the group of ranks that exchange along `axis`: their common coordinates, replicas taken together."""
        return tuple(
            None if name == axis or self.dims[a] is None else coordinates[a] for a, (name, _) in enumerate(self.axes)
        )

    def member_boxes(self, axis: str | None, coordinates: Sequence[int]) -> list[Box]:
        """What the members of a rank's group on `axis` store (`axis` None: the rank alone)."""
        if axis is None:
            return [self.box(coordinates)]
        position = self.axis(axis)
        return [
            self.box((*coordinates[:position], k, *coordinates[position + 1 :])) for k in range(self.axes[position][1])
        ]

    def shard_coordinates(self) -> Iterator[tuple[int, ...]]:
        """Coordinates of every rank of replica 0."""
        return itertools.product(
            *(range(size if self.dims[a] is not None else 1) for a, (_, size) in enumerate(self.axes))
        )


def chunk(n: int, parts: int, index: int) -> tuple[int, int]:
    """(start, stop) of piece `index` of `torch.chunk(range(n), parts)`."""
    size = -(-n // parts)
    return min(index * size, n), min((index + 1) * size, n)


def intersect(a: Box, b: Box) -> Box | None:
    """Common region of two boxes, None if empty."""
    common = tuple((max(a0, b0), min(a1, b1)) for (a0, a1), (b0, b1) in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def numel(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def block_boxes(shape: tuple[int, ...], block_rows: int | None) -> Iterator[Box]:
    """The matrices of a parameter, in storage order."""
    rows = block_rows or shape[-2]
    for lead in itertools.product(*(range(n) for n in shape[:-2])):
        for first in range(0, shape[-2], rows):
            yield (*((i, i + 1) for i in lead), (first, first + rows), (0, shape[-1]))
