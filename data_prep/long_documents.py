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
from data_prep.resolve import duplicates_bytes
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
    data = duplicates_bytes([np.array(found, np.uint32) for found in mapped("lengths", find, paths)])
    path = f"{folder}/long-{hashlib.sha256(data).hexdigest()[:16]}.duplicates"
    open_storage(config.storage).write(path, data)
    return path


def _long_documents(storage_config: StorageConfig, length: int, vocab_size: int, path: str) -> list[int]:
    storage, first, found = open_storage(storage_config), 0, list[int]()
    unit = UnitManifest.parse(storage.read(path), storage.uri(path))
    for _, offsets, _, _ in windows(storage, unit, token_dtype(vocab_size)):
        lengths = np.diff(offsets) + 1  # EOS
        found += (np.flatnonzero(lengths > length) + first).tolist()
        first += len(lengths)
    return found
