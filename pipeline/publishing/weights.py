"""One published weight file, from the checkpoint's pieces to storage, read back and compared.

Bytes are read, checked (`CheckpointReader`), rounded, hashed and written in blocks that stay in a core's cache, so that whoever writes a
file holds none of its tensors. A checksum that is wrong at the end of a piece leaves no file. Every byte that was written is read
again: the sums of the tensors and of the header, computed while writing, are those of what is in storage, or the file is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import xxhash

from pipeline.manifest import FileEntry
from pipeline.publishing.layout import WeightFile
from pipeline.storage import Storage
from pipeline.training.content import BLOCK, as_bytes
from pipeline.training.files import CheckpointReader


@dataclass(frozen=True)
class Written:
    """A file that is in storage, and the xxh3_128 of its header (under its name) and of its tensors."""

    entry: FileEntry
    xxh3: dict[str, str]


def write_file(file: WeightFile, reader: CheckpointReader, storage: Storage, folder: str) -> Written:
    """Write a weight file of the checkpoint into `folder`, replacing any; read it back.

    Raises ValueError that names a tensor which the checkpoint lacks or has in another shape, or which storage gave back
    otherwise than it was written, and DamagedCheckpoint.
    """
    path = f"{folder}/{file.name}"
    sha256, xxh3 = hashlib.sha256(file.header), {file.name: xxhash.xxh3_128_hexdigest(file.header)}
    with storage.stream(path) as out:
        out.write(file.header)
        for name, parts in groupby(checkpoint_bytes(file, reader), key=itemgetter(0)):
            one = xxhash.xxh3_128()
            for _, part in parts:
                sha256.update(part)
                one.update(part)
                out.write(part)
            xxh3[name] = one.hexdigest()
    check_file(file, xxh3, storage, folder)
    return Written(FileEntry(path=file.name, bytes=file.nbytes, sha256=sha256.hexdigest()), xxh3)


def checkpoint_bytes(file: WeightFile, reader: CheckpointReader) -> Iterator[tuple[str, memoryview]]:
    """(name of a tensor, the bytes of it that come next) of a file in order, in the published dtype; valid until the next ones are
    asked for. Raises as `CheckpointReader.box` does."""
    for source, group in groupby(file.tensors, key=lambda tensor: tensor.source):
        tensors = list(group)
        first = tensors[0]
        shape, offsets = first.shape, [0] * len(first.shape)
        if first.expert is not None:  # consecutive experts
            assert [tensor.expert for tensor in tensors] == list(range(first.expert, first.expert + len(tensors)))
            shape, offsets = (len(tensors), *first.shape), [first.expert, *offsets]
        inside = 0  # of the tensor at hand
        for vector in reader.box(source, shape, offsets, first.dtype):
            data = as_bytes(vector)
            while data:
                part = data[: tensors[0].nbytes - inside]
                yield tensors[0].name, part
                data, inside = data[len(part) :], inside + len(part)
                if inside == tensors[0].nbytes:
                    tensors.pop(0)
                    inside = 0


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
