"""The files of a dataset: one Arrow file beside dataset.json, which names it with its digest.

A dataset of 5.7 T tokens has 45,000 units, each with a packed file, a document shard and a record: as JSON 117 MB that every
process would parse. Here a row is a file; the columns are read as they lie (an uncompressed Arrow IPC file), and an
entry becomes an object when it is asked for. dataset.json stays a few kilobytes.

Columns: kind (packed, documents, quarantine, rejected, record), source (place in dataset.sources, -1 for records), path, bytes, sha256
(32 bytes; of a record its digest), rows, tokens, parts_crc32 (4 bytes each: what `PackedFile.group_crc32` has in hex).
Rows lie by source, then by kind, in the order of the plan; records last, sorted by digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, TypeVar, overload

import numpy as np
import pyarrow as pa

from pipeline.arrow import column
from pipeline.integrity import read_checked
from pipeline.manifest import DamagedRecord, DatasetManifest, FileEntry, PackedFile
from pipeline.storage import Storage

KINDS = ("packed", "documents", "quarantine", "rejected", "record")
SCHEMA = pa.schema(
    [
        ("kind", pa.int8()),
        ("source", pa.int16()),
        ("path", pa.string()),
        ("bytes", pa.int64()),
        ("sha256", pa.binary(32)),
        ("rows", pa.int64()),
        ("tokens", pa.int64()),
        ("parts_crc32", pa.binary()),
    ]
)
Entry = TypeVar("Entry", bound=FileEntry)


class Files(Sequence[Entry], Generic[Entry]):
    """Entries of one kind and source, made when asked for."""

    def __init__(self, table: pa.Table, kind: type[Entry]) -> None:
        self.table, self._kind = table, kind

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Entry]: ...
    def __getitem__(self, index: int | slice) -> Entry | Sequence[Entry]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        row = {name: self.table.column(name)[index].as_py() for name in SCHEMA.names}
        values = {"path": row["path"], "bytes": row["bytes"], "sha256": row["sha256"].hex()}
        if self._kind is PackedFile:
            values |= {"rows": row["rows"], "tokens": row["tokens"], "group_crc32": row["parts_crc32"].hex()}
        return self._kind(**values)

    @property
    def bytes(self) -> int:
        """Of all files."""
        return int(self.table["bytes"].to_numpy().sum())


class FileIndex:
    """The index, opened. Lists by source have one element for each of `dataset.sources`."""

    def __init__(self, table: pa.Table, sources: int) -> None:
        kind, source = table["kind"].to_numpy(), table["source"].to_numpy()

        def of(name: str, s: int) -> pa.Table:
            places = np.flatnonzero((kind == KINDS.index(name)) & (source == s))
            return table.slice(places[0], len(places)) if len(places) else table.slice(0, 0)

        self.packed = [Files(of("packed", s), PackedFile) for s in range(sources)]
        self.documents = [Files(of("documents", s), FileEntry) for s in range(sources)]
        self.quarantine = [Files(of("quarantine", s), FileEntry) for s in range(sources)]
        self.rejected = [Files(of("rejected", s), FileEntry) for s in range(sources)]
        self.records = [digest.hex() for digest in of("record", -1)["sha256"].to_pylist()]


def write_index(
    storage: Storage, path: str, sources: Sequence[Mapping[str, Iterable[FileEntry]]], records: Iterable[str] = ()
) -> FileEntry:
    """`sources`: of each source the files by kind. `records`: digests of the records behind them. The same files give the
    same bytes."""
    columns: dict[str, list[object]] = {name: [] for name in SCHEMA.names}
    for s, files in enumerate(sources):
        for kind in KINDS[:-1]:
            for entry in files.get(kind, ()):
                packed = entry if isinstance(entry, PackedFile) else None
                crc32 = bytes.fromhex(packed.group_crc32) if packed else b""
                rows, tokens = (packed.rows, packed.tokens) if packed else (0, 0)
                values = (
                    KINDS.index(kind),
                    s,
                    entry.path,
                    entry.bytes,
                    bytes.fromhex(entry.sha256),
                    rows,
                    tokens,
                    crc32,
                )
                for name, value in zip(SCHEMA.names, values):
                    columns[name].append(value)
    for digest in sorted(records):
        for name, value in zip(SCHEMA.names, (KINDS.index("record"), -1, "", 0, bytes.fromhex(digest), 0, 0, b"")):
            columns[name].append(value)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(
            pa.Table.from_arrays([column(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)
        )
    data = sink.getvalue().to_pybytes()
    storage.write(path, data)
    return FileEntry(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def open_index(storage: Storage, dataset: DatasetManifest) -> FileIndex:
    """Checked before a byte of it is interpreted. Raises DamagedFile with the path."""
    data = read_checked(storage, dataset.files)
    return FileIndex(pa.ipc.open_file(pa.BufferReader(data)).read_all(), len(dataset.sources))


def dataset_path(identity: str) -> str:
    return f"datasets/{identity}/dataset.json"


def index_path(identity: str) -> str:
    return f"datasets/{identity}/files.arrow"


def read_dataset(storage: Storage, identity: str, digest: str | None = None) -> DatasetManifest:
    """The committed dataset; what is sent to a rank is these two strings. Raises FileNotFoundError, and DamagedRecord for one
    that is torn, of another version, or not the one that `digest` means."""
    path = dataset_path(identity)
    dataset = DatasetManifest.parse(storage.read(path), path)
    if digest not in (None, dataset.digest):
        raise DamagedRecord(
            f"{path}: its digest is {dataset.digest[:16]}..., not {str(digest)[:16]}...: it was replaced meanwhile"
        )
    return dataset
