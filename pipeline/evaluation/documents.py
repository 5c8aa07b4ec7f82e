"""What each document scored, beside the record of an evaluation: two models are compared document by document (errors.py).

    <root>/runs/<run_id>/evaluate/documents/step-00000400-<sha256>.parquet      and in every published folder

A row a held-out document: its source, xxh3_128 of its text, tokens with the closing EOS, UTF-8 bytes, nats. A row a document of a task
and metric: task, filter and metric, lm-eval's hash of the document, the value. A text's hash is the same under any tokenizer and in any
dataset, so what two evaluations share is found whatever run, corpus or vocabulary they are of. No torch in here.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.integrity import read_checked
from pipeline.manifest import EvaluationManifest, FileEntry
from pipeline.storage import Storage

HELDOUT = pa.schema(
    [("source", pa.string()), ("key", pa.string()), ("tokens", pa.int64()), ("bytes", pa.int64()), ("nats", pa.float64())]
)  # fmt: skip
TASKS = pa.schema(
    [("task", pa.string()), ("filter", pa.string()), ("metric", pa.string()), ("key", pa.string()), ("value", pa.float64())]
)  # fmt: skip
PUBLISHED = "evaluation-documents.parquet"

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Documents:
    """The scores of single documents of one evaluation."""

    heldout: pa.Table
    tasks: pa.Table

    @classmethod
    def of(cls, heldout: Iterable[dict[str, Any]], tasks: Iterable[dict[str, Any]] = ()) -> Documents:
        return cls(pa.Table.from_pylist(list(heldout), HELDOUT), pa.Table.from_pylist(list(tasks), TASKS))

    def to_bytes(self) -> bytes:
        """One Parquet file: rows of both kinds, what a kind has not is null."""
        buffer = io.BytesIO()
        pq.write_table(pa.concat_tables([self.heldout, self.tasks], promote_options="default"), buffer)
        return buffer.getvalue()

    @classmethod
    def parse(cls, data: bytes) -> Documents:
        table = pq.read_table(io.BytesIO(data))
        of_task = pc.is_valid(table["task"])
        return cls(
            table.filter(pc.invert(of_task)).select(HELDOUT.names).cast(HELDOUT),
            table.filter(of_task).select(TASKS.names).cast(TASKS),
        )

    def of_source(self, source: str | None) -> pa.Table:
        """The rows of a source, of all without one."""
        return self.heldout if source is None else self.heldout.filter(pc.equal(self.heldout["source"], source))

    def of_task(self, task: str, filter_name: str, metric: str) -> pa.Table:
        wanted = {"task": task, "filter": filter_name, "metric": metric}
        table = self.tasks
        for column, value in wanted.items():
            table = table.filter(pc.equal(table[column], value))
        return table


def shared(a: pa.Table, b: pa.Table, on: list[str]) -> tuple[pa.Table, pa.Table]:
    """The rows of two tables whose keys are in both, in one order; where a key is there twice, its first row counts."""
    first, second = (_by_key(table, on) for table in (a, b))
    keys = [key for key in first if key in second]
    places = (pa.array([rows[key] for key in keys], pa.int64()) for rows in (first, second))
    return a.take(next(places)), b.take(next(places))


def column(table: pa.Table, name: str) -> Numbers:
    found: Numbers = table[name].to_numpy().astype(np.float64)
    return found


def path_of(run_id: str, step: int, data: bytes) -> str:
    """Named by content: a record never points at the documents of another."""
    return f"runs/{run_id}/evaluate/documents/step-{step:08d}-{hashlib.sha256(data).hexdigest()[:16]}.parquet"


def write(storage: Storage, run_id: str, step: int, documents: Documents) -> FileEntry:
    data = documents.to_bytes()
    path = path_of(run_id, step, data)
    storage.write(path, data)
    return FileEntry(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def read(storage: Storage, evaluation: EvaluationManifest) -> Documents | None:
    """None for an evaluation that kept none. Raises DamagedFile."""
    return None if evaluation.documents is None else Documents.parse(read_checked(storage, evaluation.documents))


def _by_key(table: pa.Table, on: list[str]) -> dict[tuple[Any, ...], int]:
    found: dict[tuple[Any, ...], int] = {}
    for index, key in enumerate(zip(*(table[name].to_pylist() for name in on), strict=True)):
        found.setdefault(key, index)
    return found
