"""Is a held-out document among the training rows? Found by its tokens, whatever its name.

The index holds one entry per held-out document of at least 32 tokens (shorter ones are too likely to equal a remainder of
some long document): the tokens as a packed row would hold them, that is all of them and EOS, or the first full row of a
longer document. A piece of a row is compared first by a 64-bit key of its length and first three tokens, vectorised over
a block; the few that match, by a hash of all their tokens. Under `data.packing: concat`, where rows cut documents
anywhere, only the documents that happen to lie whole in a row are found.

Size: 40 bytes an entry. Cost: about a tenth of decoding.
"""

from __future__ import annotations

import hashlib
import io
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.dataset.packed_file import Block, Layout
from pipeline.manifest import DatasetManifest
from pipeline.storage import Storage

MIN_TOKENS = 32


class HeldoutIndex(NamedTuple):
    keys: NDArray[np.uint64]  # sorted
    names: dict[bytes, str]  # hash of the tokens -> source and name of the document

    def find(self, block: Block) -> str:
        """The first held-out document of a block and its row; '' if there is none."""
        if not len(self.keys):
            return ""
        lengths = block.lengths.astype(np.int64)
        row_of = np.repeat(np.arange(len(block.tokens)), np.diff(block.offsets))
        ends = np.cumsum(lengths)
        used = np.bincount(row_of, weights=lengths, minlength=len(block.tokens)).astype(np.int64)
        first = ends - lengths - (np.cumsum(used) - used)[row_of]  # column of each piece
        long = np.flatnonzero(lengths >= MIN_TOKENS)
        starts = block.tokens[row_of[long, None], first[long, None] + np.arange(3)]
        for i in long[np.isin(_keys(lengths[long], starts), self.keys)]:
            row, column = int(row_of[i]), int(first[i])
            name = self.names.get(_hash(block.tokens[row, column : column + int(lengths[i])]))
            if name:
                return f"row {row}: {name} is held out, but it is among the training rows"
        return ""


def heldout_index(dataset: DatasetManifest, storage: Storage) -> HeldoutIndex:
    """From all held-out files that can be read: damaged ones are for `checks.py` to name."""
    layout, names = Layout.of(dataset), {}
    lengths, starts = [], []
    for source in dataset.sources:
        for entry in source.heldout:
            try:
                table = pq.read_table(io.BytesIO(storage.read(entry.path)), columns=["tokens", "doc_id"])
            except (FileNotFoundError, pa.ArrowException, OSError):
                continue
            for data, name in zip(table.column("tokens").to_pylist(), table.column("doc_id").to_pylist()):
                document = np.frombuffer(data, dtype=layout.dtype)
                row = np.append(document, np.array([dataset.tokenizer.eos_id], layout.dtype))[: layout.row_tokens]
                if len(row) >= MIN_TOKENS:
                    names[_hash(row)] = f"document {name!r} of source {source.name}"
                    lengths.append(len(row))
                    starts.append(row[:3])
    if not names:
        return HeldoutIndex(np.zeros(0, np.uint64), {})
    return HeldoutIndex(np.unique(_keys(np.array(lengths), np.array(starts))), names)


def _keys(lengths: NDArray[np.int64], starts: NDArray[np.unsignedinteger]) -> NDArray[np.uint64]:
    """Length and first three tokens in 64 bits; unequal pieces may share a key, equal ones do."""
    with np.errstate(over="ignore"):
        key = lengths.astype(np.uint64)
        for column in range(3):
            key = key * np.uint64(0x9E3779B97F4A7C15) + starts[:, column].astype(np.uint64)
    return key


def _hash(tokens: NDArray[np.unsignedinteger]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(tokens).tobytes(), digest_size=16).digest()
