"""The held-out documents that are scored: read with their checksums, decoded back to the text that prepare measured."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.schema import RunConfig
from pipeline.integrity import DamagedFile, read_checked
from pipeline.manifest import DatasetManifest, HeldoutFile, SourceManifest
from pipeline.storage import Storage
from pipeline.tokenizer import Encoder

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HeldoutText:
    """The held-out documents of one source that are scored."""

    source: str
    documents: list[Tokens]  # without EOS
    text_bytes: list[int]  # UTF-8 bytes of each

    @property
    def scored_tokens(self) -> int:
        return sum(len(tokens) + 1 for tokens in self.documents)


def heldout_texts(dataset: DatasetManifest, config: RunConfig, storage: Storage) -> list[HeldoutText]:
    """Of every source that holds documents out. Raises ValueError if none does, and DamagedFile."""
    texts = [text for source in dataset.sources if (text := read_heldout(source, dataset, config, storage)).documents]
    if not texts:
        raise ValueError(
            f"corpus.heldout_fraction {config.corpus.heldout_fraction}: dataset {dataset.identity[:8]} holds out no document; "
            "raise the fraction and prepare again"
        )
    return texts


def read_heldout(source: SourceManifest, dataset: DatasetManifest, config: RunConfig, storage: Storage) -> HeldoutText:
    """Whole documents in stored order; one that would exceed `evaluation.max_tokens_per_source` is passed over.

    If none fits, the shortest is taken: a finished training run does not fail for the want of a short document.
    """
    dtype = np.dtype(dataset.token_dtype).newbyteorder("<")
    found: list[tuple[Tokens, int]] = []
    for file in source.heldout:
        table = _read_table(storage, file)
        tokens = (np.frombuffer(raw, dtype=dtype).astype(np.int64) for raw in table["tokens"].to_pylist())
        found += zip(tokens, table["n_bytes"].to_pylist())
    budget = config.evaluation.max_tokens_per_source
    kept = []
    for document in found:
        if len(document[0]) + 1 <= budget:
            budget -= len(document[0]) + 1
            kept.append(document)
    if found and not kept:
        kept = [min(found, key=lambda document: len(document[0]))]
    return HeldoutText(source.name, [tokens for tokens, _ in kept], [n_bytes for _, n_bytes in kept])


def _read_table(storage: Storage, file: HeldoutFile) -> pa.Table:
    """A file's tokens and byte counts. Raises DamagedFile, with the row group where a page tells."""
    try:
        data = read_checked(storage, file)
    except DamagedFile as error:
        raise DamagedFile(f"{error}{_damaged_group(storage, file)}") from None
    return pq.read_table(io.BytesIO(data), columns=["tokens", "n_bytes"])


def _damaged_group(storage: Storage, file: HeldoutFile) -> str:
    """`: row group 3`, the first that does not decode with its pages' checksums; '' if the damage is elsewhere."""
    group = -1
    try:
        with storage.open(file.path) as handle:
            parquet = pq.ParquetFile(handle, page_checksum_verification=True)
            for group in range(parquet.num_row_groups):
                parquet.read_row_group(group, use_threads=False)
    except (pa.ArrowException, OSError, ValueError, KeyError):  # a damaged footer may name columns in no encoding
        return "" if group < 0 else f": row group {group}"
    return ""


def decode(text: HeldoutText, encoder: Encoder) -> list[bytes]:
    """The UTF-8 text of each document; every size is the one that prepare measured."""
    pieces = []
    for number, (tokens, n_bytes) in enumerate(zip(text.documents, text.text_bytes)):
        piece = encoder.decode(tokens).encode()
        assert len(piece) == n_bytes, (
            f"{text.source} document {number}: decodes to {len(piece)} bytes, stored as {n_bytes}"
        )
        pieces.append(piece)
    return pieces
