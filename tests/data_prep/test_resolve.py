"""Duplicates and held-out documents over units, against plain Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.resolve import Indexes, Partition, find_duplicates, read_all_duplicates, read_duplicates, read_index
from data_prep.tokenize_unit import document_hash, index_bytes, is_heldout_candidate
from pipeline.config.schema import StorageConfig
from pipeline.storage import open_storage


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 30), max_size=20), min_size=1, max_size=5),
    st.lists(st.integers(1, 255), max_size=3),
)
def test_the_first_copy_stays(
    tmp_path_factory: pytest.TempPathFactory, units: list[list[int]], cuts: list[int]
) -> None:
    """Whatever the partition into hash ranges: a document is a copy exactly if it came before, in this unit or an earlier one."""
    config = StorageConfig(root=str(tmp_path_factory.mktemp("root")))
    storage = open_storage(config)
    paths = []
    for place, unit in enumerate(units):
        hashes = [document_hash(str(document).encode()) for document in unit]
        paths.append(f"{place}.index" if unit else "")
        if unit:
            storage.write(paths[-1], index_bytes(hashes))
    edges = sorted({0, 256, *cuts})
    outputs = [
        find_duplicates(config, {"main": Indexes(tuple(paths))}, Partition("main", low, high, f"{low}.duplicates"))
        for low, high in zip(edges, edges[1:])
    ]
    seen: set[int] = set()
    for place, unit in enumerate(units):
        expected = []
        for ordinal, document in enumerate(unit):
            if document in seen:
                expected.append(ordinal)
            seen.add(document)
        found = [read_duplicates(storage, path, place, len(units)) for path in outputs]
        at_once = [read_all_duplicates(storage, path, len(units))(place) for path in outputs]
        assert all(map(np.array_equal, found, at_once))
        assert sorted(np.concatenate(found).tolist()) == expected


def test_an_index_is_read_by_range(tmp_path: Path) -> None:
    hashes = [document_hash(str(number).encode()) for number in range(1000)]
    storage = open_storage(StorageConfig(root=str(tmp_path)))
    storage.write("a.index", index_bytes(hashes))
    for low, high in [(0, 256), (0, 1), (17, 90), (255, 256)]:
        records = read_index(storage, "a.index", low, high)
        expected = sorted((value, number) for number, value in enumerate(hashes) if low <= value[0] < high)
        found = [int(high).to_bytes(8, "big") + int(low).to_bytes(8, "big") for high, low, _ in records.tolist()]
        assert list(zip(found, records["ordinal"].tolist())) == expected


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5])
def test_candidates_are_the_fraction(fraction: float) -> None:
    chosen: Callable[[int], bool] = lambda number: is_heldout_candidate(document_hash(b"%d" % number), fraction)  # noqa: E731
    count = sum(chosen(number) for number in range(20_000))
    assert abs(count - 20_000 * fraction) <= 4 * (20_000 * fraction) ** 0.5
