"""One published weight file, from the checkpoint's pieces to storage, read back and compared.

Whoever writes a file holds one tensor of the checkpoint in the published dtype and one of its stored pieces; an expert stack
counts as one tensor, because a piece of it holds many experts. Every byte that is read is checked (`CheckpointReader`), and every byte
that was written is read again: the sums of the tensors and of the header, computed while writing, are those of what is in
storage, or the file is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from math import prod

import torch
import xxhash

from pipeline.manifest import FileEntry
from pipeline.publishing.layout import Placed, WeightFile
from pipeline.storage import Storage
from pipeline.training.content import BLOCK, as_bytes
from pipeline.training.files import CheckpointReader


@dataclass(frozen=True)
class Written:
    """A file that is in storage, and the xxh3_128 of its header (under its name) and of its tensors."""

    entry: FileEntry
    xxh3: dict[str, str]


class Room:
    """Memory that is used again: fresh pages for every tensor cost more than filling them."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised; valid until the next call."""
        size = prod(shape) * dtype.itemsize
        if self._bytes.numel() < size:
            self._bytes = torch.empty(size, dtype=torch.uint8)
        return self._bytes[:size].view(dtype).view(shape)


def write_file(file: WeightFile, reader: CheckpointReader, storage: Storage, folder: str) -> Written:
    """Write a weight file of the checkpoint into `folder`, replacing any; read it back.

    Raises ValueError that names a tensor which the checkpoint lacks or has in another shape, or which storage gave back
    otherwise than it was written, and DamagedCheckpoint.
    """
    path = f"{folder}/{file.name}"
    sha256, xxh3 = hashlib.sha256(), {file.name: xxhash.xxh3_128_hexdigest(file.header)}
    with storage.stream(path) as out:
        sha256.update(file.header)
        out.write(file.header)
        for name, tensor in checkpoint_tensors(file, reader):
            one = xxhash.xxh3_128()
            for block in blocks(tensor):
                sha256.update(block)
                one.update(block)
                out.write(block)
            xxh3[name] = one.hexdigest()
    check_file(file, xxh3, storage, folder)
    return Written(FileEntry(path=file.name, bytes=file.nbytes, sha256=sha256.hexdigest()), xxh3)


def checkpoint_tensors(file: WeightFile, reader: CheckpointReader) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a file in order, in the published dtype; a tensor is valid until the next one is asked for."""
    room = Room()
    for _, group in groupby(file.tensors, key=lambda tensor: tensor.source):
        yield from _read(list(group), reader, room)


def _read(tensors: list[Placed], reader: CheckpointReader, room: Room) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of one file that come from one of the checkpoint's: itself, or consecutive experts."""
    first = tensors[0]
    if first.expert is None:
        whole = room.tensor(first.shape, first.dtype)
        reader.read_box(first.source, whole, [0] * whole.dim())
        yield first.name, whole
        return
    assert [tensor.expert for tensor in tensors] == list(range(first.expert, first.expert + len(tensors)))
    stack = room.tensor((len(tensors), *first.shape), first.dtype)
    reader.read_box(first.source, stack, [first.expert, 0, 0])
    for tensor, matrix in zip(tensors, stack):
        yield tensor.name, matrix


def check_file(file: WeightFile, xxh3: dict[str, str], storage: Storage, folder: str) -> None:
    """Read a written file again. Raises ValueError for the first part of it that is not as it was written."""
    path = f"{folder}/{file.name}"
    buffer = memoryview(bytearray(BLOCK))
    with storage.open(path) as source:
        sizes = [(file.name, len(file.header)), *((tensor.name, tensor.nbytes) for tensor in file.tensors)]
        for name, size in sizes:
            found, left = xxhash.xxh3_128(), size
            while left:
                count = source.readinto(buffer[: min(left, BLOCK)])  # type: ignore[attr-defined]
                if not count:
                    break
                found.update(buffer[:count])
                left -= count
            if left or found.hexdigest() != xxh3[name]:
                raise ValueError(
                    f"{storage.uri(path)}: {name} is not in storage as it was written; look at the storage's health, "
                    "then publish again"
                )
        if source.read(1):
            raise ValueError(f"{storage.uri(path)}: longer than it was written; who else writes there? Publish again")


def blocks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a contiguous tensor in pieces that stay in a core's cache."""
    data = as_bytes(tensor)
    for start in range(0, len(data), BLOCK):
        yield data[start : start + BLOCK]
