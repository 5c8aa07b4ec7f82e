"""Documents that are longer than a row where none may be cut (`data.packing: whole`). They are not trained on, so of documents that resemble
each other, or say the same, one that fits stays before one that is long (near/components.py, paragraphs/find.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from data_prep.pack_unit import windows
from data_prep.records import UnitManifest, shard_path
from data_prep.resolve import duplicates_bytes, read_duplicates
from data_prep.tokenize_unit import token_dtype
from data_prep.units import Units
from pipeline.config.schema import RunConfig, StorageConfig
from pipeline.storage import open_storage

Mapped = Callable[[str, Callable[[Any], Any], Sequence[Any]], list[Any]]
"""(phase, function, items) -> results in the items' order."""


def find_long_documents(config: RunConfig, units: Units, vocab_size: int, folder: str, mapped: Mapped) -> str:
    """Path of their ordinals by unit, as `resolve.read_duplicates` reads them; '' where documents may be cut."""
    if config.data.packing != "whole":
        return ""
    paths = [shard_path("units", unit_id, ".json") for unit_id in units.ids]
    find = partial(_long_documents, config.storage, config.data.sequence_length, vocab_size)
    data = duplicates_bytes(mapped("lengths", find, paths))
    path = f"{folder}/long-{hashlib.sha256(data).hexdigest()[:16]}.duplicates"
    open_storage(config.storage).write(path, data)
    return path


def _long_documents(storage_config: StorageConfig, length: int, vocab_size: int, path: str) -> np.ndarray:
    """Of a unit. All its tokens are read for it once: the next version of the dataset finds what came of it, named by its documents."""
    storage = open_storage(storage_config)
    unit = UnitManifest.parse(storage.read(path), storage.uri(path))
    if unit.documents is None:
        return np.zeros(0, np.int64)
    known = shard_path("lengths", f"{unit.documents.sha256[:32]}-{length}", ".long")
    if not storage.exists(known):
        first, found = 0, [np.zeros(0, np.int64)]
        for _, offsets, _, _ in windows(storage, unit, token_dtype(vocab_size)):
            lengths = np.diff(offsets) + 1  # EOS
            found.append(np.flatnonzero(lengths > length) + first)
            first += len(lengths)
        storage.write(known, duplicates_bytes([np.concatenate(found)]))
    return read_duplicates(storage, known, 0, 1)
