"""Distributed Checkpoint (DCP) reading and writing straight to a run's storage.

`torch.distributed.checkpoint` writes one file a rank and `.metadata` from rank 0; here both go through the fsspec file
system that the run's `Storage` uses, a folder or S3 with its endpoint and retries, so no byte is staged on local disk.
Each file's size and sha256 are taken as it is written and end up in the checkpoint's manifest. torch writes `.metadata`
under a temporary name and moves it; that is no commit for us (the manifest is), so its contents need no protection.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta

from pipeline.manifest import FileEntry
from pipeline.storage import Storage


class CheckpointWriter(FileSystemWriter):
    """A DCP writer into `folder` of the storage. `entries` lists what this rank wrote, once `save` has returned."""

    def __init__(self, storage: Storage, folder: str) -> None:
        super().__init__(folder, sync_files=not storage.config.is_s3)  # S3 is durable when the upload ends
        self.fs: Any = _Files(storage)
        self.path: Any = storage.key(folder)
        self._folder = folder

    def storage_meta(self) -> StorageMeta:
        """What torch would fill with the absolute path and a random id: the same state gives the same bytes anywhere."""
        return StorageMeta(checkpoint_id=self._folder, save_id="")

    @property
    def entries(self) -> list[FileEntry]:
        found = [
            FileEntry(path=f"{self._folder}/{os.path.basename(path)}", bytes=size, sha256=sha256)
            for path, (size, sha256) in self.fs.written.items()
        ]
        return sorted(found, key=lambda entry: entry.path)


class CheckpointReader(FileSystemReader):
    """A DCP reader of `folder` of the storage; ranged reads, so a rank fetches only what its shards need."""

    def __init__(self, storage: Storage, folder: str) -> None:
        super().__init__(folder)
        self.fs: Any = _Files(storage)
        self.path: Any = storage.key(folder)


class _Files(FileSystemBase):
    """The file operations DCP asks for."""

    def __init__(self, storage: Storage) -> None:
        self._fs = storage.fs
        self.written: dict[str, tuple[int, str]] = {}  # path -> bytes, sha256

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with self._fs.open(str(path), mode) as stream:
            if mode == "rb":
                yield stream
                return
            hashing = _HashingStream(stream)
            yield hashing
        self.written[str(path)] = (hashing.size, hashing.digest.hexdigest())

    def concat_path(self, path: Any, suffix: str) -> str:
        return f"{path}/{suffix}"

    def rename(self, path: Any, new_path: Any) -> None:
        self._fs.mv(str(path), str(new_path))
        self.written[str(new_path)] = self.written.pop(str(path))

    def init_path(self, path: Any) -> Any:
        return path

    def mkdir(self, path: Any) -> None:
        self._fs.makedirs(str(path), exist_ok=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def exists(self, path: Any) -> bool:
        return bool(self._fs.exists(str(path)))

    def rm_file(self, path: Any) -> None:
        self._fs.rm_file(str(path))


class _HashingStream(io.RawIOBase):
    """Forwards a sequential write and hashes it on the way."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.size = 0
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._stream.write(view)
        self.digest.update(view)
        self.size += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self.size

    def fileno(self) -> int:
        self._stream.flush()
        return int(self._stream.fileno())
