"""What no prepare on these libraries can go below, for benchmarks/prepare.py: folder, format, tokenizer -> a JSON line.

One process reads the same files with the same libraries, encodes, and compresses the ids as documents (LZ4) and as rows
(zstd), and does nothing else: no hashes, checks, filters, held-out split, packing, files or re-reading. CPU-seconds by step.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.tokenize_unit import BATCH_BYTES
from pipeline.tokenizer import Encoder

PAGE_BYTES = 1 << 20


def main(folder: Path, name: str, tokenizer: Path) -> None:
    encoder = Encoder.load(tokenizer, engines=("gigatoken",))
    rows, documents = pa.Codec("zstd", 3), pa.Codec("lz4")
    steps: Counter[str] = Counter()
    size = tokens = 0
    begin = time.process_time()

    def done(step: str) -> None:
        nonlocal begin
        steps[step] += time.process_time() - begin
        begin = time.process_time()

    for batch in _batches(folder / name):
        done("read")
        ids, _ = encoder.encode(batch)
        done("encode")
        data = memoryview(ids.astype(np.uint16)).cast("B")
        pages = [data[start : start + PAGE_BYTES] for start in range(0, len(data), PAGE_BYTES)]
        done("cast")
        for page in pages:
            documents.compress(page)
        done("lz4")
        for page in pages:
            rows.compress(page)
        done("zstd")
        size, tokens = size + sum(map(len, batch)), tokens + len(ids)
    total = sum(steps.values())
    print(json.dumps({"text_mb": size / 1e6, "tokens": tokens, "cpu_s": total, **steps}))


def _batches(folder: Path) -> Iterator[list[bytes]]:
    batch, size = list[bytes](), 0
    for text in _texts(folder):
        if batch and size + len(text) > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    yield batch


def _texts(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.iterdir()):
        if path.suffix == ".parquet":
            for some in pq.ParquetFile(path).iter_batches(512, columns=["text"], use_threads=False):
                yield from some.column(0).cast(pa.large_binary()).to_pylist()
            continue
        left = b""
        with pa.CompressedInputStream(pa.OSFile(str(path)), "zstd") as stream:
            while chunk := stream.read(PAGE_BYTES):
                *lines, left = (left + chunk).split(b"\n")
                for line in lines:
                    yield orjson.loads(line)["text"].encode()


if __name__ == "__main__":
    if len(sys.argv) <= 3:
        raise SystemExit("a part of python -m benchmarks.prepare, which starts it")
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
