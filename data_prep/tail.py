"""The rests of units: rows short of a whole group, gathered from many units into whole groups.

A file of packed rows holds whole row groups only, so that a row's place is arithmetic. Left to itself each unit would drop
its last rows; here up to 512 units of one generation share a tail, and less than one group of each tail is dropped. Units
that come later have a tail of their own, so older tails stay as they are.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from data_prep.pack_unit import PackSettings, layout, packed_writer
from data_prep.records import PackManifest, TailManifest, shard_path
from data_prep.writer import put_packed
from pipeline.integrity import read_checked, read_record
from pipeline.manifest import PackedFile, digest_of
from pipeline.storage import Storage, open_storage

TAIL_UNITS = 512


@dataclass(frozen=True)
class TailTask:
    rests: tuple[PackedFile, ...]  # in the order of the plan


def tail_tasks(packs: Sequence[PackManifest], generations: Sequence[int]) -> list[TailTask]:
    """The tails of one source; units in the order of the plan, generations ascending."""
    tasks = []
    for _, group in groupby(zip(generations, packs), key=lambda pair: pair[0]):
        rests = [pack.rest for _, pack in group]
        for start in range(0, len(rests), TAIL_UNITS):
            some = tuple(rest for rest in rests[start : start + TAIL_UNITS] if rest)
            tasks += [TailTask(some)] if some else []
    return tasks


def build_tail(settings: PackSettings, task: TailTask) -> TailManifest:
    """The committed manifest; at once if the tail is done already."""
    storage = open_storage(settings.storage)
    tail_id = digest_of({"rests": [rest.sha256 for rest in task.rests], "layout": layout(settings.data)})[:32]
    done = read_record(storage, shard_path("tails", tail_id, ".json"), TailManifest)
    if done is not None:
        return done
    with tempfile.TemporaryDirectory(prefix="tail-") as folder:
        writer = packed_writer(Path(folder), tail_id, settings)
        for tokens_L, doc_lens in _rows(storage, task.rests, writer.dtype):
            writer.add([tokens_L], doc_lens)
        writer.close()
        manifest = TailManifest(
            id=tail_id,
            rests=tuple((rest.path, rest.rows) for rest in task.rests),
            packed=tuple(put_packed(storage, tail_id, file) for file in writer.files),
            dropped_rows=writer.rest[1] if writer.rest else 0,
            dropped_tokens=writer.rest[2] if writer.rest else 0,
        )
    storage.create(manifest.path, manifest.to_json())
    return manifest


def _rows(storage: Storage, rests: Sequence[PackedFile], dtype: np.dtype) -> Iterator[tuple[np.ndarray, list[int]]]:
    for rest in rests:
        table = pq.ParquetFile(io.BytesIO(read_checked(storage, rest))).read(use_threads=False)
        for tokens, doc_lens in zip(table["tokens"].to_pylist(), table["doc_lens"].to_pylist()):
            yield np.frombuffer(tokens, dtype), doc_lens
