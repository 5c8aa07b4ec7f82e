"""What is written window by window is a plain write's bytes, and is there only if it was read back so."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import checked_stream as module
from pipeline.checked_stream import CheckedObject, NotAsWritten, checked_stream
from pipeline.config.schema import StorageConfig
from pipeline.storage import Storage, open_storage
from tests.test_storage import names

WINDOW = 16


@pytest.fixture
def places(tmp_path: Path, s3_root: StorageConfig) -> list[Storage]:
    return [open_storage(StorageConfig(root=str(tmp_path))), open_storage(s3_root)]


@given(st.lists(st.binary(max_size=50), max_size=8), st.integers(1, 40), st.integers(0, 10_000))
@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_pieces_are_the_bytes_of_a_plain_write(
    places: list[Storage], pieces: list[bytes], window: int, size: int
) -> None:
    """Whatever the windows, and whatever was said of the size beforehand."""
    whole = b"".join(pieces)
    for storage in places:
        with checked_stream(storage, "a/b", size=size, window=window) as out:
            for piece in pieces:
                out.write(piece)
        assert storage.read("a/b") == whole
        assert (out.bytes, out.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())
        assert names(storage, "a") == ["a/b"]


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    return open_storage(StorageConfig(root=str(tmp_path)))


def written(out: CheckedObject, root: Path, data: bytes) -> Path:
    """The file that holds what was written so far, before it has its name."""
    out.write(data)
    out._file.flush()
    (path,) = (root / "a").glob("b.tmp-*")
    assert path.stat().st_size == len(data)
    return path


def change(storage: Storage, data: bytes, at: int, other: bytes) -> None:
    """Another program writes into the file that is being written."""
    with checked_stream(storage, "a/b", window=WINDOW) as out:
        path = written(out, Path(storage.root), data)
        with path.open("r+b") as file:
            file.seek(at)
            file.write(other)


@pytest.mark.parametrize(
    ("at", "other", "message"),
    [(17, b"!", "bytes 16 to 20 are not in storage as they were written"), (20, b"!", "longer than it was written")],
)
def test_other_bytes_than_were_written_are_refused(folder: Storage, at: int, other: bytes, message: str) -> None:
    folder.write("a/b", b"before")
    with pytest.raises(NotAsWritten, match=rf"a/b: {message}"):
        change(folder, bytes(20), at, other)
    assert folder.read("a/b") == b"before"
    assert names(folder) == ["a/b"]


def test_a_file_that_was_cut_short_is_refused(folder: Storage) -> None:
    def cut() -> None:
        with checked_stream(folder, "a/b", window=WINDOW) as out:
            os.truncate(written(out, Path(folder.root), bytes(20)), 18)

    with pytest.raises(NotAsWritten, match="a/b: bytes 16 to 20 are not in storage"):
        cut()
    assert names(folder) == []


class Flipped(Storage):
    """Gives back one bit otherwise than it was written."""

    def open(self, path: str) -> Any:
        data = bytearray(self.read(path))
        data[17] ^= 1
        self.write(path, bytes(data))
        return super().open(path)


def test_s3_that_gives_back_other_bytes_is_named(s3_root: StorageConfig) -> None:
    def write() -> None:
        with checked_stream(Flipped(s3_root), "a/b", window=WINDOW) as out:
            out.write(bytes(40))

    with pytest.raises(NotAsWritten, match=r"s3://.*/a/b: bytes 16 to 32 are not in storage as they were written"):
        write()


@pytest.mark.parametrize("size", [0, 10, 5 * WINDOW + 3])
def test_a_writer_that_breaks_off_leaves_what_was_there(folder: Storage, size: int) -> None:
    folder.write("a/b", b"before")

    def break_off() -> None:
        with checked_stream(folder, "a/b", window=WINDOW) as out:
            out.write(bytes(size))
            raise KeyError("half-way")

    with pytest.raises(KeyError, match="half-way"):
        break_off()
    assert folder.read("a/b") == b"before"
    assert names(folder) == ["a/b"]
    assert not [each for each in threading.enumerate() if each.name.startswith(("sync", "read-back"))]


@pytest.mark.skipif(not hasattr(os, "fdatasync"), reason="of Linux")
def test_a_disk_that_did_not_take_it_is_told_of_once_and_heard(
    folder: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel does: the stream's own sync at the end would say that all is well."""
    told: list[int] = []
    sync = os.fdatasync

    def fail_once(file: int) -> None:
        if not told:
            told.append(file)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(file)

    monkeypatch.setattr(os, "fdatasync", fail_once)

    def write() -> None:
        with checked_stream(folder, "a/b", window=WINDOW) as out:
            out.write(bytes(2 * WINDOW))

    with pytest.raises(OSError, match=r"Input/output error: .*a/b"):
        write()
    assert names(folder) == []


def test_room_that_the_disk_does_not_have_is_refused_before_the_first_byte(folder: Storage) -> None:
    def write() -> None:
        with checked_stream(folder, "a/b", size=2**62):
            raise AssertionError("something was written")

    with pytest.raises(OSError, match=r"File too large: .*a/b"):
        write()
    assert names(folder) == []


def test_no_more_than_a_few_windows_wait(folder: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is slower than the writer holds it up, instead of the page cache filling."""
    open_gate, asked = threading.Event(), threading.Semaphore(0)
    check = module.ReadBack.check

    def wait(self: module.ReadBack, window: module.Window) -> None:
        asked.release()
        assert open_gate.wait(60)
        check(self, window)

    monkeypatch.setattr(module.ReadBack, "check", wait)
    done: list[int] = []

    def write() -> None:
        with checked_stream(folder, "a/b", window=WINDOW) as out:
            for _ in range(10):
                out.write(bytes(WINDOW))
                done.append(out.bytes)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert asked.acquire(timeout=60)
        writer.join(0.3)
        assert writer.is_alive()
        assert len(done) <= module.BEHIND
    finally:
        open_gate.set()
        writer.join(60)
    assert folder.read("a/b") == bytes(10 * WINDOW)
