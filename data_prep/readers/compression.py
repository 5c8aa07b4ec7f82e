"""A file's bytes, decompressed as they are read."""

from __future__ import annotations

import lzma
from typing import IO, Any

import pyarrow as pa

from data_prep.formats import MAGIC_BYTES, compression_of

READ_BYTES = 1024 * 1024
XZ_MEMORY = 256 * 1024 * 1024  # of a dictionary: `xz -9` asks for 65 MB, `xz --lzma2=dict=1536MiB` for 1.5 GB


def decompressed(path: str, file: IO[bytes]) -> Any:
    """Something with `read(size)`. Raises, while reading, ArrowInvalid, OSError without errno or LZMAError for damaged data."""
    head = file.read(MAGIC_BYTES)
    file.seek(0)
    codec = compression_of(path, head)
    if codec is None:
        return file
    if codec == "xz":
        return _Xz(file)
    return pa.CompressedInputStream(pa.PythonFile(_Borrowed(file), "r"), codec)


class _Borrowed:
    """A file that Arrow does not close: it closes what it reads from when it forgets it."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self.read = file.read

    def close(self) -> None:
        pass


class _Xz:
    """Streams one after the other, with padding between them, in bounded memory (lzma.LZMAFile has no limit)."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._stream: lzma.LZMADecompressor | None = None

    def read(self, size: int) -> bytes:
        while True:
            if self._stream is None:
                data = self._rest.lstrip(b"\x00") or self._file.read(READ_BYTES).lstrip(b"\x00")
                if not data:
                    return b""
                self._stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY)
            elif self._stream.needs_input:
                data = self._file.read(READ_BYTES)
                if not data:
                    raise EOFError("the xz stream ends early")
            else:
                data = b""
            out = self._stream.decompress(data, size)
            if self._stream.eof:
                self._rest, self._stream = self._stream.unused_data, None
            if out:
                return out

    _rest = b""
