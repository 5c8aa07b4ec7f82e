"""Documents that were rejected, kept with the reason on request (`corpus.keep_rejected`): Parquet, a row a document.

What a filter rejected is written with its text while the unit is read. Copies (of a document in this source, in another, or
held out) are known only afterwards: they are named, and their text is that of the document they are copies of.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.records import UnitManifest
from data_prep.writer import parquet_writer
from pipeline.integrity import open_checked
from pipeline.storage import Storage

SCHEMA = pa.schema(
    [
        pa.field("location", pa.string()),  # null for copies
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),  # the name it is counted under in `filtered`
        pa.field("text", pa.large_string()),  # null for copies
    ]
)
GROUP_BYTES = 8 * 1024 * 1024
ZSTD_LEVEL = 3


class RejectedDocuments:
    """A file under construction, in row groups of about GROUP_BYTES of text."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._rows: list[tuple[str | None, str, str, str | None]] = []
        self._size = 0
        self._writer: pq.ParquetWriter | None = None

    def add(self, location: str | None, doc_id: str, reason: str, text: bytes | None = None) -> None:
        """`text`: valid UTF-8."""
        self._rows.append((location, doc_id, reason, None if text is None else text.decode()))
        self.count += 1
        self._size += len(text or b"") + len(doc_id)
        if self._size >= GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            self._writer = parquet_writer(self.path, SCHEMA, ZSTD_LEVEL)
        columns = [pa.array(column, kind.type) for column, kind in zip(zip(*self._rows), SCHEMA)]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=SCHEMA))
        self._rows, self._size = [], 0


def write_copies(
    storage: Storage, unit: UnitManifest, ordinals: dict[str, np.ndarray], folder: Path
) -> RejectedDocuments:
    """Name the documents of a unit that are copies. `ordinals`: of each reason, sorted."""
    reasons = {int(ordinal): reason for reason, found in ordinals.items() for ordinal in found}
    rejected = RejectedDocuments(folder / "rejected.parquet")
    if reasons:
        for first, ids in _doc_ids(storage, unit):
            for ordinal in range(first, first + len(ids)):
                if ordinal in reasons:
                    rejected.add(None, ids[ordinal - first].as_py(), reasons[ordinal])
    rejected.close()
    assert rejected.count == len(reasons), f"{unit.id}: {rejected.count} of {len(reasons)} copies are in the shard"
    return rejected


def _doc_ids(storage: Storage, unit: UnitManifest) -> Iterable[tuple[int, pa.ChunkedArray]]:
    assert unit.documents is not None
    first = 0
    with open_checked(storage, unit.documents) as file:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        for group in range(parquet.metadata.num_row_groups):
            ids = parquet.read_row_group(group, columns=["doc_id"], use_threads=False)["doc_id"]
            yield first, ids
            first += len(ids)
