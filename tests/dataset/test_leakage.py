"""Held-out documents among training rows are found by their tokens; others are not accused."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import StorageConfig
from pipeline.dataset.leakage import HeldoutIndex, heldout_index
from pipeline.dataset.packed_file import Block
from pipeline.manifest import HeldoutFile
from pipeline.storage import Storage, open_storage
from tests.dataset import make

ROW = 128
RNG = np.random.default_rng(0)
SHORT, WHOLE, LONG, TINY = (RNG.integers(0, make.EOS, length).astype(np.uint16) for length in (40, ROW - 1, 300, 20))


@pytest.fixture
def storage(tmp_path) -> Storage:
    return open_storage(StorageConfig(root=str(tmp_path)))


@pytest.fixture
def index(storage: Storage) -> HeldoutIndex:
    documents = {"short": SHORT, "whole": WHOLE, "long": LONG, "tiny": TINY}
    out = io.BytesIO()
    pq.write_table(
        pa.table({"tokens": [tokens.tobytes() for tokens in documents.values()], "doc_id": list(documents)}), out
    )
    storage.write("heldout.parquet", out.getvalue())
    entry = HeldoutFile(path="heldout.parquet", bytes=1, sha256="", documents=4, tokens=1, text_bytes=1)
    missing = entry.model_copy(update={"path": "missing.parquet"})
    dataset = make.rows_only([4, 4], ROW, 4)
    sources = (dataset.sources[0], dataset.sources[1].model_copy(update={"heldout": (missing, entry)}))
    return heldout_index(dataset.model_copy(update={"sources": sources}), storage)


def row(*pieces: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Documents with EOS, as far as they fit the row, then padding."""
    tokens = np.concatenate([np.append(piece, make.EOS) for piece in pieces])[:ROW].astype(np.uint16)
    lengths = [min(len(piece) + 1, ROW) for piece in pieces]
    return np.append(tokens, np.full(ROW - len(tokens), make.EOS, np.uint16)), lengths


def block(*rows: tuple[np.ndarray, list[int]]) -> Block:
    lengths = np.array([length for _, lengths in rows for length in lengths], dtype=np.int32)
    offsets = np.cumsum([0, *(len(lengths) for _, lengths in rows)]).astype(np.int32)
    return Block(np.stack([tokens for tokens, _ in rows]), lengths, offsets)


def other(length: int) -> np.ndarray:
    return RNG.integers(0, make.EOS, length).astype(np.uint16)


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([row(other(50), SHORT), row(other(99))], "row 0: document 'short' of source s1 is held out"),
        ([row(other(99)), row(SHORT, other(50))], "row 1: document 'short' of source s1 is held out"),
        ([row(other(10)), row(WHOLE)], "row 1: document 'whole' of source s1 is held out"),
        ([row(other(10)), row(LONG)], "row 1: document 'long' of source s1 is held out"),  # its first full row
        ([row(other(10)), row(TINY)], ""),  # too short to tell
        ([row(other(40)), row(np.append(SHORT[:-1], 7)), row(SHORT[:-1]), row(np.append(SHORT, 7))], ""),
        ([(np.full(ROW, make.EOS, np.uint16), []), row(other(5))], ""),
    ],
)
def test_found_by_tokens(index: HeldoutIndex, rows: list, found: str) -> None:
    assert index.find(block(*rows)).startswith(found)
    assert bool(index.find(block(*rows))) == bool(found)


def test_nothing_held_out(storage: Storage) -> None:
    index = heldout_index(make.rows_only([4], ROW, 4), storage)
    assert index.find(block(row(SHORT))) == ""
