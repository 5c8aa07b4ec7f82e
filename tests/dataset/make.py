"""Datasets for the tests of the reading side: real packed files with recognisable tokens, or manifests alone.

In a file written here row r of source s starts with the tokens [s, r]: what was read says where it came from.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.schema import CorpusConfig, DataConfig, MixtureStage, SourceConfig
from pipeline.file_index import index_path, open_index, write_index
from pipeline.manifest import DatasetManifest, DocumentCounts, FileEntry, PackedFile, SourceManifest, TokenizerManifest
from pipeline.packed import group_crc32
from pipeline.storage import Storage

VOCABULARY = 60_000
NO_INDEX = FileEntry(path="none", bytes=0, sha256="")
EOS = VOCABULARY - 1
PLENTY = DocumentCounts(docs_in=10**6, docs_out=10**6, heldout=0, filtered={}, quarantined={})


def corpus(
    weights: Sequence[float], stages: Sequence[tuple[int, Sequence[float]]] = (), max_epochs: float = 1.0
) -> CorpusConfig:
    """Sources s0, s1, ...; `stages` are (until_tokens, weights)."""
    return CorpusConfig(
        sources=tuple(
            SourceConfig(name=f"s{i}", path="unused", weight=weight, max_epochs=max_epochs)
            for i, weight in enumerate(weights)
        ),
        mixture=tuple(
            MixtureStage(until_tokens=until, weights={f"s{i}": weight for i, weight in enumerate(values)})
            for until, values in stages
        ),
    )


def layout(
    row_tokens: int, group: int, *, lanes: int, window: int = 2, block: int = 8, cache: int = 1 << 24
) -> DataConfig:
    return DataConfig(
        sequence_length=row_tokens,
        rows_per_group=group,
        lanes=lanes,
        window_blocks=window,
        mixture_block=block,
        cache_bytes=cache,
    )


def manifest(
    sources: Sequence[Sequence[PackedFile]],
    row_tokens: int,
    group: int,
    dtype: str = "uint16",
    storage: Storage | None = None,
) -> DatasetManifest:
    """With `storage` the index of the files is there, and they can be read."""
    files = NO_INDEX if storage is None else write_index(storage, index_path("test"), [{"packed": s} for s in sources])
    return DatasetManifest(
        identity="test",
        tokenizer=TokenizerManifest(
            folder="tokenizers/t",
            files=(),
            vocab_size=VOCABULARY,
            eos_id=EOS,
            special_tokens={"[EOS]": EOS},
            sha256="0" * 64,
        ),
        token_dtype=dtype,
        sequence_length=row_tokens,
        rows_per_group=group,
        sources=tuple(
            SourceManifest(
                name=f"s{i}",
                heldout=(),
                counts=PLENTY,
                rows=sum(file.rows for file in packed),
                tokens=sum(file.tokens for file in packed),
                text_bytes=0,
                dropped_rows=0,
            )
            for i, packed in enumerate(sources)
        ),
        files=files,
        versions={},
    )


def rows_only(
    rows: Sequence[int], row_tokens: int = 16, group: int = 4, storage: Storage | None = None
) -> DatasetManifest:
    """A manifest with no packed files behind it: enough for everything but reading."""
    return manifest(
        [
            [
                PackedFile(
                    path=f"none/{i}", bytes=1, sha256="0" * 64, rows=count, tokens=count * row_tokens, group_crc32=""
                )
            ]
            for i, count in enumerate(rows)
        ],
        row_tokens,
        group,
        storage=storage,
    )


def packed_bytes(tokens: np.ndarray, doc_lens: list[list[int]], group: int) -> bytes:
    """A packed Parquet file: tokens [rows, L] as fixed-size binary, checksummed pages, no statistics."""
    width = tokens.shape[1] * tokens.dtype.itemsize
    flat = pa.py_buffer(np.ascontiguousarray(tokens).tobytes())
    columns = [
        pa.Array.from_buffers(pa.binary(width), len(tokens), [None, flat]),
        pa.array(doc_lens, pa.list_(pa.int32())),
    ]
    fields = [pa.field("tokens", pa.binary(width), nullable=False), pa.field("doc_lens", pa.list_(pa.int32()))]
    table = pa.Table.from_arrays(columns, schema=pa.schema(fields))
    out = io.BytesIO()
    pq.write_table(
        table,
        out,
        row_group_size=group,
        compression="zstd",
        compression_level=3,
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    return out.getvalue()


def write_packed(storage: Storage, path: str, tokens: np.ndarray, doc_lens: list[list[int]], group: int) -> PackedFile:
    """The file in storage, and its entry in a manifest."""
    data = packed_bytes(tokens, doc_lens, group)
    storage.write(path, data)
    return PackedFile(
        path=path,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        rows=len(tokens),
        tokens=sum(map(sum, doc_lens)),
        group_crc32=group_crc32(io.BytesIO(data)),
    )


def documents(rng: np.random.Generator, row_tokens: int) -> list[int]:
    """Lengths of the documents of one row; some rows end in padding."""
    lengths = []
    while row_tokens >= 4 and len(lengths) < 4:
        lengths.append(int(rng.integers(3, row_tokens + 1)))
        row_tokens -= lengths[-1]
    return lengths


def write(
    storage: Storage, groups: Sequence[Sequence[int]], row_tokens: int = 16, group: int = 4, dtype: str = "uint16"
) -> DatasetManifest:
    """Files of `groups[s][f]` row groups each, in storage, and their manifest."""
    rng = np.random.default_rng(0)
    sources = []
    for s, counts in enumerate(groups):
        files, row = [], 0
        for f, count in enumerate(counts):
            rows = count * group
            tokens = rng.integers(0, EOS, (rows, row_tokens)).astype(dtype)
            doc_lens = [documents(rng, row_tokens) for _ in range(rows)]
            for r, lengths in enumerate(doc_lens):
                tokens[r, np.cumsum(lengths) - 1] = EOS
                tokens[r, sum(lengths) :] = EOS
                tokens[r, :2] = s, row + r
            row += rows
            files.append(write_packed(storage, f"datasets/test/packed/s{s}-{f}.parquet", tokens, doc_lens, group))
        sources.append(files)
    return manifest(sources, row_tokens, group, dtype, storage)


def packed_of(dataset: DatasetManifest, storage: Storage, source: int = 0) -> Sequence[PackedFile]:
    return open_index(storage, dataset).packed[source]
