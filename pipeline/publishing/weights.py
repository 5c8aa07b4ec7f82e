"""One published weight file, from the checkpoint's pieces to storage, read back and compared.

Bytes are read, checked (`CheckpointReader`), rounded and written in blocks that stay in a core's cache, so that whoever writes a
file holds none of its tensors. A checksum that is wrong at the end of a piece leaves no file. Every byte that was written is read
again beside the writing (checked_stream.py): the file's sha256 is that of what storage gave back, or the file is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import xxhash

from pipeline.checked_stream import checked_stream
from pipeline.manifest import FileEntry
from pipeline.publishing.layout import WeightFile
from pipeline.storage import Storage
from pipeline.training.content import as_bytes
from pipeline.training.files import CheckpointReader


@dataclass(frozen=True)
class Written:
    """A file that is in storage, and the xxh3_128 of its header (under its name) and of its tensors."""

    entry: FileEntry
    xxh3: dict[str, str]


def write_file(file: WeightFile, reader: CheckpointReader, storage: Storage, folder: str) -> Written:
    """Write a weight file of the checkpoint into `folder`, replacing any; read it back.

    Raises ValueError that names a tensor which the checkpoint lacks or has in another shape, DamagedCheckpoint, and NotAsWritten for
    bytes that storage gave back otherwise.
    """
    xxh3 = {file.name: xxhash.xxh3_128_hexdigest(file.header)}
    with checked_stream(storage, f"{folder}/{file.name}", size=file.nbytes) as out:
        out.write(file.header)
        for name, parts in groupby(checkpoint_bytes(file, reader), key=itemgetter(0)):
            one = xxhash.xxh3_128()
            for _, part in parts:
                one.update(part)
                out.write(part)
            xxh3[name] = one.hexdigest()
    assert out.bytes == file.nbytes
    return Written(FileEntry(path=file.name, bytes=out.bytes, sha256=out.sha256), xxh3)


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
