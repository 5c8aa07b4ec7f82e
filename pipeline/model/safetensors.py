"""Reading single tensors out of safetensors files, by byte range.

A file is: 8 bytes, the length of the header (little endian); the header, JSON {name: {dtype, shape, data_offsets}};
the data. Only the header and the bytes of the tensors asked for are read, so a rank that needs one expert of a 5 GB
file on S3 makes one ranged GET; both are checked where their xxh3_128 is known. Works on every seekable binary file; the `safetensors` package wants a local path.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import IO, NamedTuple

import torch
import xxhash
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LARGEST_HEADER = 100_000_000  # the format's own limit


class TensorEntry(NamedTuple):
    """Where a tensor lies."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte offset in the file
    nbytes: int


class TensorFiles:
    """The tensors of a set of safetensors files; `open` gives a seekable binary file for a file's name.

    `xxh3`: checksums of tensors by name and of headers by file name; what they disagree with is refused by name.
    """

    def __init__(self, files: list[str], open: Callable[[str], IO[bytes]], xxh3: Mapping[str, str] = {}) -> None:
        self._open = open
        self._xxh3 = xxh3
        self.entries: dict[str, TensorEntry] = {}
        for file in files:
            for name, entry in self._header(file).items():
                if name in self.entries:
                    raise ValueError(f"{name}: in both {self.entries[name].file} and {file}; keep one of the two files")
                self.entries[name] = entry

    def read(self, name: str) -> Tensor:
        """The whole tensor in its stored dtype."""
        entry = self.entries[name]
        with self._open(entry.file) as file:
            file.seek(entry.start)
            data = bytearray(file.read(entry.nbytes))
        if len(data) != entry.nbytes:
            raise ValueError(f"{entry.file}: ends inside tensor {name!r}; the file is cut off, fetch it again")
        self._check(name, data, f"{entry.file}: tensor {name!r}")
        if not data:
            return torch.empty(entry.shape, dtype=entry.dtype)
        return torch.frombuffer(data, dtype=entry.dtype).view(entry.shape)

    def _header(self, name: str) -> dict[str, TensorEntry]:
        with self._open(name) as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= LARGEST_HEADER:
                raise ValueError(f"{name}: not a safetensors file (header of {length} bytes)")
            data = file.read(length)
            self._check(name, length.to_bytes(8, "little") + data, f"{name}: its header")
            try:
                header = json.loads(data)
            except ValueError as error:
                raise ValueError(f"{name}: not a safetensors file (its header is no JSON); fetch it again") from error
        header.pop("__metadata__", None)
        found = {}
        for tensor, fields in header.items():
            if fields["dtype"] not in DTYPES:
                raise ValueError(
                    f"{tensor}: dtype {fields['dtype']} in {name} is not supported; use one of {list(DTYPES)}"
                )
            start, end = fields["data_offsets"]
            found[tensor] = TensorEntry(
                name, DTYPES[fields["dtype"]], tuple(fields["shape"]), 8 + length + start, end - start
            )
        return found

    def _check(self, key: str, data: bytes | bytearray, what: str) -> None:
        expected = self._xxh3.get(key)
        if expected is not None and xxhash.xxh3_128_hexdigest(data) != expected:
            raise ValueError(f"{what} is damaged: its bytes are not those that were published; restore the file")


def header_of(file: IO[bytes]) -> bytes:
    """The length and the header of a safetensors file: all but the data."""
    length = file.read(8)
    return length + file.read(int.from_bytes(length, "little"))
