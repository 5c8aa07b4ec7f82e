"""Records, and the files that they vouch for, checked before they are used."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from typing import IO, Any, TypeVar

from pipeline.manifest import DamagedRecord, FileEntry, Record, fields_of
from pipeline.storage import CHUNK, Storage, sha256_of

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


@contextlib.contextmanager
def open_checked(storage: Storage, entry: FileEntry) -> Iterator[IO[bytes]]:
    """The file, opened when all of it has been checked; on S3 from a local copy, so that it is fetched once. Raises DamagedFile."""
    if not storage.config.is_s3:
        problem = damage(storage, entry)
        if problem:
            raise DamagedFile(problem)
        with storage.open(entry.path) as file:
            yield file
        return
    with tempfile.TemporaryFile(prefix="checked-") as copy:
        found = hashlib.sha256()
        try:
            with storage.open(entry.path) as file:
                while chunk := file.read(CHUNK):
                    found.update(chunk)
                    copy.write(chunk)
        except FileNotFoundError:
            raise DamagedFile(f"{storage.uri(entry.path)}: the file is missing") from None
        problem = _differs(entry, copy.tell(), found.hexdigest())
        if problem:
            raise DamagedFile(f"{storage.uri(entry.path)}: {problem}")
        copy.seek(0)
        yield copy


def read_fields(storage: Storage, path: str) -> dict[str, Any] | None:
    """The fields of a record of whatever kind, checked by the digest that it carries; None without one. Raises DamagedRecord."""
    data = storage.read_or_none(path)
    try:
        return None if data is None else fields_of(data)
    except ValueError as error:
        raise DamagedRecord(f"{storage.uri(path)}: {error}") from None


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
