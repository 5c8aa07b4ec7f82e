"""The Parquet layouts, and writing them so that what is committed is what was meant.

Tokens are raw little-endian integers in binary columns, compressed: Parquet has no 16-bit integers, and lists cost
three times as much to read. No dictionary (ids rarely repeat as whole rows), no statistics (min and max of a binary row
would be the row itself, twice, in the footer), page checksums (zstd pages with a flipped bit read back without an error
otherwise). Files are built in a local folder, re-read, hashed, then put.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_prep.records import shard_path
from pipeline.arrow import column
from pipeline.manifest import FileEntry, PackedFile
from pipeline.packed import group_crc32
from pipeline.storage import Storage, sha256_of

DOCUMENT_SCHEMA = pa.schema(
    [
        pa.field("tokens", pa.binary(), nullable=False),  # without EOS
        pa.field("doc_hash", pa.binary(16), nullable=False),
        pa.field("n_bytes", pa.int64(), nullable=False),
        pa.field("doc_id", pa.string(), nullable=False),
    ]
)


def packed_schema(length: int, itemsize: int) -> pa.Schema:
    """`tokens`: one row of `length` ids. `doc_lens`: tokens of each piece, EOS included; the rest of the row is padding."""
    lens = pa.list_(pa.field("element", pa.int32(), nullable=False))
    return pa.schema(
        [pa.field("tokens", pa.binary(length * itemsize), nullable=False), pa.field("doc_lens", lens, nullable=False)]
    )


def parquet_writer(path: Path, schema: pa.Schema, zstd_level: int | None = None) -> pq.ParquetWriter:
    """zstd for what training reads again and again; LZ4 (None) for what is read once or twice: a third of the CPU, 20 % larger."""
    return pq.ParquetWriter(
        path,
        schema,
        compression="lz4" if zstd_level is None else "zstd",
        compression_level=zstd_level,
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
        data_page_size=1 << 20,
        store_schema=False,
    )


def document_table(
    tokens: np.ndarray, offsets: np.ndarray, hashes: list[bytes], n_bytes: list[int], ids: list[str]
) -> pa.Table:
    """`tokens` of all documents in a row, `offsets` [n + 1] in tokens."""
    byte_offsets = (offsets * tokens.itemsize).astype(np.int32)
    token_column = pa.Array.from_buffers(
        pa.binary(), len(hashes), [None, pa.py_buffer(byte_offsets), pa.py_buffer(tokens)]
    )
    columns = [
        token_column,
        _fixed(pa.py_buffer(b"".join(hashes)), 16, len(hashes)),
        column(n_bytes, pa.int64()),
        column(ids, pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=DOCUMENT_SCHEMA)


def token_buffer(documents: pa.Array, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, offsets [n + 1]) of a binary column without copying."""
    _, offset_buffer, data = documents.buffers()
    offsets = np.frombuffer(offset_buffer, np.int32)[documents.offset : documents.offset + len(documents) + 1].astype(
        np.int64
    )
    values = np.frombuffer(data, dtype=np.uint8) if data is not None else np.zeros(0, np.uint8)
    tokens = values[offsets[0] : offsets[-1]].view(dtype)
    return tokens, (offsets - offsets[0]) // np.dtype(dtype).itemsize


class PackedWriter:
    """Rows into files of `groups_per_file` whole groups of `rows_per_group`; what is left over at `close` is the rest, a file of one short group."""

    def __init__(
        self,
        folder: Path,
        name: str,
        length: int,
        dtype: Any,
        fill: int,
        rows_per_group: int,
        groups_per_file: int,
        zstd_level: int,
    ) -> None:
        self._folder, self._name = folder, name
        self._schema = packed_schema(length, np.dtype(dtype).itemsize)
        self._groups_per_file, self._zstd_level = groups_per_file, zstd_level
        self._fill = fill
        self.dtype = np.dtype(dtype)
        self._tokens_RL = np.full((rows_per_group, length), fill, dtype)
        self._doc_lens: list[list[int]] = []
        self._writer: pq.ParquetWriter | None = None
        self._groups = 0  # in the open file
        self._written = xxhash.xxh3_128()  # of the open file's token bytes
        self.files: list[tuple[Path, int, int]] = []  # path, rows, tokens
        self.rest: tuple[Path, int, int] | None = None
        self.padding = 0

    def add(self, pieces: Iterable[np.ndarray], lengths: list[int]) -> None:
        """One row: the tokens of its pieces, each of `lengths[i]` tokens; a piece that is one short ends with EOS, the fill."""
        row_L = self._tokens_RL[len(self._doc_lens)]
        position = 0
        for tokens, length in zip(pieces, lengths):
            row_L[position : position + len(tokens)] = tokens
            position += length
        self._doc_lens.append(lengths)
        if len(self._doc_lens) == len(self._tokens_RL):
            self._flush()

    def close(self) -> None:
        self._close_file()
        if self._doc_lens:
            self._flush(f"{self._name}-rest.parquet")
            self._close_file()
            self.rest = self.files.pop()

    def _flush(self, name: str = "") -> None:
        """Write the rows that wait as one row group."""
        rows, length = len(self._doc_lens), self._tokens_RL.shape[1]
        if self._writer is None:
            path = self._folder / (name or f"{self._name}-{len(self.files):05d}.parquet")
            self._writer = parquet_writer(path, self._schema, self._zstd_level)
            self.files.append((path, 0, 0))
        data = pa.py_buffer(self._tokens_RL[:rows])
        lens = np.fromiter((value for row in self._doc_lens for value in row), np.int32)
        edges = np.zeros(rows + 1, np.int32)
        np.cumsum([len(row) for row in self._doc_lens], out=edges[1:])
        doc_lens = pa.ListArray.from_buffers(
            self._schema.field("doc_lens").type,
            rows,
            [None, pa.py_buffer(edges)],
            children=[pa.Array.from_buffers(pa.int32(), len(lens), [None, pa.py_buffer(lens)])],
        )
        tokens_column = _fixed(data, length * self._tokens_RL.itemsize, rows)
        self._writer.write_table(
            pa.Table.from_arrays([tokens_column, doc_lens], schema=self._schema), row_group_size=rows
        )
        path, rows_before, tokens_before = self.files[-1]
        tokens = int(lens.sum())
        self.files[-1] = (path, rows_before + rows, tokens_before + tokens)
        self.padding += rows * length - tokens
        self._written.update(data)
        self._groups += 1
        self._doc_lens = []
        self._tokens_RL[:] = self._fill
        if self._groups == self._groups_per_file:
            self._close_file()

    def _close_file(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        verify_packed(self.files[-1][0], self._written.digest())
        self._writer, self._groups, self._written = None, 0, xxhash.xxh3_128()


def verify_packed(path: Path, written: bytes) -> None:
    """Read every page back, with its checksum; the token bytes must be those that were written."""
    found = xxhash.xxh3_128()
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for group in range(file.metadata.num_row_groups):
            tokens = file.read_row_group(group, columns=["tokens"], use_threads=False).column(0).combine_chunks()
            found.update(tokens.buffers()[1])
    if found.digest() != written:
        raise OSError(
            f"{path.name}: what was read back differs from what was written; the local disk or memory is faulty"
        )


def put(storage: Storage, local: Path, path: str) -> FileEntry:
    with local.open("rb") as file:
        digest = sha256_of(file)
    storage.upload(local, path)
    return FileEntry(path=path, bytes=local.stat().st_size, sha256=digest)


def put_packed(storage: Storage, name: str, file: tuple[Path, int, int]) -> PackedFile:
    """`file`: a local file called `name` and a suffix, its rows and tokens."""
    local, rows, tokens = file
    entry = put(storage, local, shard_path("packed", name, local.name.removeprefix(name)))
    with local.open("rb") as opened:
        return PackedFile(**entry.model_dump(), rows=rows, tokens=tokens, group_crc32=group_crc32(opened))


def _fixed(data: pa.Buffer, width: int, count: int) -> pa.Array:
    return pa.Array.from_buffers(pa.binary(width), count, [None, data])
