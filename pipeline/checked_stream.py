"""An object that is read back while it is being written.

What goes through `Storage.stream` is cut into windows, each with a checksum. In a folder two threads follow the writer, at most
`BEHIND` windows behind: one has the disk take what was written, the other reads it again, compares it, adds it to the sha256 and lets
the kernel forget its pages. The writer hashes nothing twice and waits for the disk only at the end; what the object takes of memory
and of the page cache does not depend on its size. On S3 it is read back once it is there.

Pages are given back because new ones are dear: a kernel that keeps 2 GB of new pages spent 1.2 to 2.9 CPU-seconds on writing, syncing and reading
them on a virtual machine (whose host hands its memory out page by page), one that uses the same pages again 0.6. A file that
was published is read again rarely, a checkpoint beside it all the time, and its pages stay. The last window stays, too: an object
that is smaller than one is in the cache for whoever comes next. Direct I/O (O_DIRECT) spends 0.3, but what it wrote can only be read back from the disk: twice
the bytes for the disk, which then takes longer than the hashing.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Self

import xxhash

from pipeline.storage import Storage

WINDOW = 32 * 2**20  # bytes
BEHIND = 2  # windows that are written and not yet read back
FALLOC_FL_KEEP_SIZE = 1  # of linux/falloc.h: the file is as long as what was written, whatever is reserved
CANNOT_RESERVE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINTR}
BLOCK = 256 * 1024  # bytes that are read back at once: they stay in a core's cache

Read = Callable[[int, memoryview], int]  # fills memory from a byte of the object on and says how far it got


class NotAsWritten(ValueError):
    """Storage gives back other bytes than it was given."""


@dataclass(frozen=True)
class Window:
    """Bytes [start, stop) of the object, as they were written."""

    start: int
    stop: int
    xxh3: bytes


class CheckedObject:
    """What a `checked_stream` writes to, from front to back. `bytes`: so far; `sha256`: of what storage gave back, after the block."""

    def __init__(self, file: IO[bytes], window: int, written: Callable[[Window], None]) -> None:
        self.bytes = 0
        self.sha256 = ""
        self._file, self._window, self._written = file, window, written
        self._start = 0  # of the window at hand
        self._sum = xxhash.xxh3_128()

    def write(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        while left:
            part = left[: self._start + self._window - self.bytes]
            self._file.write(part)
            self._sum.update(part)
            self.bytes += len(part)
            left = left[len(part) :]
            if self.bytes == self._start + self._window:
                self.end_window()

    def end_window(self) -> None:
        if self.bytes > self._start:
            self._written(Window(self._start, self.bytes, self._sum.digest()))
            self._start = self.bytes
            self._sum.reset()


@contextmanager
def checked_stream(storage: Storage, path: str, *, size: int = 0, window: int = WINDOW) -> Iterator[CheckedObject]:
    """Write an object as `Storage.stream` does, and read every byte of it back. Atomic in a folder: an object that was not read back
    as it was written is never there. On S3 it is there by then.

    `size`: bytes that it is going to have, if that is known: a folder's disk is asked for the room at once, so one that is too full says so
    before the first byte. Raises NotAsWritten that names the object and where in it.
    """
    if storage.config.is_s3:
        windows: list[Window] = []
        with storage.stream(path) as file:
            out = CheckedObject(file, window, windows.append)
            yield out
            out.end_window()
        with storage.open(path) as source:
            back = ReadBack(lambda _, into: source.readinto(into), storage.uri(path))  # type: ignore[attr-defined]
            for each in windows:
                back.check(each)
            out.sha256 = back.finish()
        return
    with storage.stream(path) as file, Follower(file, storage.uri(path), window) as follower:
        _reserve(file.fileno(), size)
        out = CheckedObject(file, window, follower.follow)
        yield out
        out.end_window()
        out.sha256 = follower.finish()


class ReadBack:
    """An object's windows in order, compared with what was written."""

    def __init__(self, read: Read, where: str) -> None:
        self._read, self._where = read, where
        self._buffer = memoryview(bytearray(BLOCK))
        self._sha256 = hashlib.sha256()
        self._end = 0

    def check(self, window: Window) -> None:
        found = xxhash.xxh3_128()
        while self._end < window.stop:
            count = self._read(self._end, self._buffer[: window.stop - self._end])
            if not count:
                break
            found.update(self._buffer[:count])
            self._sha256.update(self._buffer[:count])
            self._end += count
        if found.digest() != window.xxh3:
            raise NotAsWritten(
                f"{self._where}: bytes {window.start} to {window.stop} are not in storage as they were written; look at the "
                "storage's health, then write it again"
            )

    def finish(self) -> str:
        """The object's sha256. Raises NotAsWritten if it goes on after the last window."""
        if self._read(self._end, self._buffer[:1]):
            raise NotAsWritten(f"{self._where}: longer than it was written; who else writes there? Write it again")
        return self._sha256.hexdigest()


class Follower:
    """Syncs a file that is being written, reads it back and gives its pages back, window by window, in two threads."""

    def __init__(self, file: IO[bytes], where: str, window: int) -> None:
        self._file, self._window = file, window
        self._source = os.open(file.name, os.O_RDONLY)
        self._back = ReadBack(lambda start, into: os.preadv(self._source, [into], start), where)
        self._syncs = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._reads = ThreadPoolExecutor(1, thread_name_prefix="read-back")
        self._running: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for threads in (self._syncs, self._reads):
            threads.shutdown(cancel_futures=True)
        os.close(self._source)

    def follow(self, window: Window) -> None:
        """The window has been written. Raises what went wrong with an earlier one."""
        self._file.flush()
        synced = self._syncs.submit(_sync_data, self._file.fileno())
        self._running.append(self._reads.submit(self._settle, window, synced))
        while len(self._running) > BEHIND:
            self._running.popleft().result()

    def finish(self) -> str:
        """The sha256 of the file, all of which is on the disk. Raises what went wrong."""
        while self._running:
            self._running.popleft().result()
        return self._back.finish()

    def _settle(self, window: Window, synced: Future[None]) -> None:
        self._back.check(window)
        synced.result()  # the kernel tells of a failed write once: here, and not when the stream syncs at its end
        length = window.stop - window.start
        if length == self._window and hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._source, window.start, length, os.POSIX_FADV_DONTNEED)


def _reserve(file: int, size: int) -> None:
    """Blocks for a file of so many bytes, where the file system can give them. The kernel writes into them at half the cost."""
    # os.posix_fallocate would write into every block where the file system cannot
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)  # not on macOS
    if size and fallocate and fallocate(file, FALLOC_FL_KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(size)):
        number = ctypes.get_errno()
        if number not in CANNOT_RESERVE:
            raise OSError(number, os.strerror(number))


def _sync_data(file: int) -> None:
    getattr(os, "fdatasync", os.fsync)(file)  # the first is not on macOS
