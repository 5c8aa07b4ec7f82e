"""Records, and the files that they vouch for, checked before they are used."""

from __future__ import annotations

import hashlib
from typing import TypeVar

from pipeline.manifest import FileEntry, Record
from pipeline.storage import Storage, sha256_of

RecordT = TypeVar("RecordT", bound=Record)


class DamagedFile(ValueError):
    """A stored file is missing or its bytes are not those on record; the message has its path and what is wrong."""


def read_record(storage: Storage, path: str, kind: type[RecordT]) -> RecordT | None:
    """The record at a path, None without one. Raises DamagedRecord, which names the path."""
    data = storage.read_or_none(path)
    return None if data is None else kind.parse(data, storage.uri(path))


def read_checked(storage: Storage, entry: FileEntry, folder: str = "") -> bytes:
    """The bytes of a file whose path is relative to `folder` below the storage root. Raises DamagedFile."""
    path = f"{folder}/{entry.path}" if folder else entry.path
    data = storage.read_or_none(path)
    if data is None:
        raise DamagedFile(f"{storage.uri(path)}: the file is missing")
    problem = _differs(entry, len(data), hashlib.sha256(data).hexdigest())
    if problem:
        raise DamagedFile(f"{storage.uri(path)}: {problem}")
    return data


def damage(storage: Storage, entry: FileEntry, folder: str = "") -> str:
    """What is wrong with a file, in constant memory; '' if it is as it was written."""
    path = f"{folder}/{entry.path}" if folder else entry.path
    try:
        with storage.open(path) as file:
            found = sha256_of(file)
            size = file.tell()
    except FileNotFoundError:
        return f"{storage.uri(path)}: the file is missing"
    problem = _differs(entry, size, found)
    return f"{storage.uri(path)}: {problem}" if problem else ""


def _differs(entry: FileEntry, size: int, sha256: str) -> str:
    if size != entry.bytes:
        return f"{size} bytes, {entry.bytes} were written"
    return "" if sha256 == entry.sha256 else f"sha256 is {sha256[:16]}..., written as {entry.sha256[:16]}..."
