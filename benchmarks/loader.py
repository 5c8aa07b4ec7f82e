"""The loader against MosaicML Streaming and a Megatron-style memory map, on the same tokens, in one run.

    python -m benchmarks.loader [--tokens 33000000] [--rounds 3]

Measured, medians of interleaved rounds, in CPU-seconds of the whole process (all threads):

decode    a verified row group to an array: CRC-32, page checksums, zstd-3, for 16- and 32-bit tokens
verify    the whole proof of a packed file
batches   shuffled batches of int64, as training receives them: an epoch in each system's own global shuffle
reads     bytes read by all ranks of an epoch, divided by the bytes of the blocks: ranks divide lanes
shuffle   spread of a sorted property's mean over batches, relative to batches drawn at random; rows sharing a block
seek      a manifest of 5.7 T tokens (no data behind it): open it and find the first sequence; find 1,000 random ones

Tokens: words, spaces and punctuation of the Python sources on this machine, numbered by frequency: real text
compresses, random numbers do not. Streaming is measured when it can be imported; it reads what its own writer wrote with
zstd-3 and xxh64 hashes (checked, as ours are), and keeps an uncompressed copy of each shard on disk; the memory map is not
compressed and not checked, and its pages are in the page cache.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import re
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.arguments import positive
from data_prep.writer import PackedWriter, put_packed
from pipeline.config.schema import CorpusConfig, DataConfig, SourceConfig, StorageConfig
from pipeline.dataset.loader import Loader
from pipeline.dataset.order import Order
from pipeline.dataset.packed_file import Layout, fetch_range, read_footer, read_group
from pipeline.dataset.verify import verify
from pipeline.file_index import dataset_path, index_path, open_index, read_dataset, write_index
from pipeline.manifest import DatasetManifest, DocumentCounts, FileEntry, PackedFile, SourceManifest, TokenizerManifest
from pipeline.storage import Storage, open_storage

ROW = 4096
VOCABULARY = 50_000
BATCH = 64
COUNTS = DocumentCounts(docs_in=0, docs_out=0, heldout=0, filtered={}, quarantined={})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=positive, default=33_000_000)
    parser.add_argument("--rounds", type=positive, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="loader-benchmark-"))
    try:
        results = run(folder, arguments.tokens, arguments.rounds)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(results))


def run(folder: Path, count: int, rounds: int) -> list[dict[str, Any]]:
    group = 256
    rows = count // ROW // group * group
    tokens = text_tokens(rows * ROW).reshape(rows, ROW)
    storage = open_storage(StorageConfig(root=str(folder)))
    ours = {dtype: write_packed(storage, folder, tokens, dtype, group) for dtype in ("uint16", "uint32")}
    tokens.tofile(folder / "tokens.bin")
    for dtype, dataset in ours.items():
        size = sum(file.bytes for file in open_index(storage, dataset).packed[0])
        print(f"{rows * ROW / 1e6:.1f} M tokens, {dtype}, {size / rows / ROW:.2f} bytes per token stored")

    systems: dict[str, Callable[[], float]] = {
        "decode, 16-bit tokens": lambda: decode_rate(storage, ours["uint16"]),
        "decode, 32-bit tokens": lambda: decode_rate(storage, ours["uint32"]),
        "verify, 16-bit tokens": lambda: verify_rate(storage, ours["uint16"]),
        "batches, ours": lambda: batch_rate(storage, ours["uint16"]),
        "batches, memory map": lambda: memmap_rate(folder / "tokens.bin", rows),
    }
    problem = streaming_problem()
    if problem:
        print(f"MosaicML Streaming is not measured: {problem}")
    else:
        write_streaming(folder / "mds", tokens)
        systems["batches, MosaicML Streaming"] = lambda: streaming_rate(folder, rows)
    del tokens
    rates: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, measure in systems.items():
            rates[name].append(measure())
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"\n{'M tokens per CPU-second':34s} {'median':>8s}  rounds")
    for name, values in rates.items():
        print(f"{name:34s} {medians[name]:8.0f}  {', '.join(f'{value:.0f}' for value in values)}")

    results = [
        result(f"loader: {name}, M tokens per CPU-second", medians[name], None, 300, medians[name] >= 300)
        for name in ("decode, 16-bit tokens", "decode, 32-bit tokens")
    ]
    ours_rate = medians["batches, ours"]
    results.append(
        result(
            "loader: shuffled batches, M tokens per CPU-second, against an unchecked memory map",
            ours_rate,
            medians["batches, memory map"],
            300,
            ours_rate >= 300,
        )
    )
    theirs = medians.get("batches, MosaicML Streaming")
    if theirs is not None:
        results.append(
            result(
                "loader: shuffled batches, M tokens per CPU-second, against MosaicML Streaming",
                ours_rate,
                theirs,
                round(theirs, 1),
                ours_rate >= theirs,
            )
        )
    worst = max(read_amplification(storage, folder, ranks) for ranks in (1, 2, 4, 8))
    results.append(result("loader: read amplification, 1, 2, 4 and 8 ranks on 8 lanes", worst, None, 1.1, worst <= 1.1))
    results += shuffle()
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a fresh process, for its memory
        return results + pool.apply(seek)


def result(name: str, ours: float, peer: float | None, target: float | None, met: bool | None) -> dict[str, Any]:
    ratio = None if peer is None else round(ours / peer, 2)
    return {
        "benchmark": name,
        "ours": round(ours, 4),
        "peer": peer and round(peer, 1),
        "ratio": ratio,
        "target": target,
        "met": met,
    }


# -- data --------------------------------------------------------------------------------------------------------


def text_tokens(count: int) -> np.ndarray:
    """uint16 ids of the words of Python sources, by frequency; the text repeats if it is shorter than asked for."""
    words: list[str] = []
    for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
        words += re.findall(r" ?\w+|\n\s*|[^\w\s]+|\s", path.read_text(errors="ignore"))
        if len(words) > count:
            break
    ids = {
        word: number for number, (word, _) in enumerate(collections.Counter(words).most_common(VOCABULARY - 1), start=1)
    }
    found = np.fromiter((ids.get(word, 0) for word in words), dtype=np.uint16, count=len(words))
    return np.resize(found, count)


def write_packed(storage: Storage, folder: Path, tokens: np.ndarray, dtype: str, group: int) -> DatasetManifest:
    """The tokens as the data stage writes them: one document a row."""
    local = folder / f"local-{dtype}-{group}"
    local.mkdir()
    writer = PackedWriter(local, local.name, tokens.shape[1], np.dtype(dtype), 0, group, 256, 3)
    for row in tokens:
        writer.add([row], [len(row)])
    writer.close()
    files = [put_packed(storage, local.name, file) for file in writer.files]
    return manifest([files], dtype, tokens.shape[1], group, storage)


def manifest(
    sources: list[list[PackedFile]], dtype: str, row_tokens: int, group: int, storage: Storage | None = None
) -> DatasetManifest:
    """With `storage` the index of the files is there, and they can be read."""
    name = f"{dtype}-{row_tokens}-{group}"
    files = FileEntry(path="none", bytes=0, sha256="")
    if storage is not None:
        files = write_index(storage, index_path(name), [{"packed": packed} for packed in sources])
    tokenizer = TokenizerManifest(folder="t", files=(), vocab_size=VOCABULARY, eos_id=0, special_tokens={}, sha256="")
    return DatasetManifest(
        identity=name,
        tokenizer=tokenizer,
        token_dtype=dtype,
        sequence_length=row_tokens,
        rows_per_group=group,
        sources=tuple(
            SourceManifest(
                name=f"s{number}",
                heldout=(),
                counts=COUNTS,
                rows=sum(file.rows for file in packed),
                tokens=sum(file.tokens for file in packed),
                text_bytes=0,
                dropped_rows=0,
            )
            for number, packed in enumerate(sources)
        ),
        files=files,
        versions={},
    )


def order_of(dataset: DatasetManifest, lanes: int, window: int) -> Order:
    data = DataConfig(
        sequence_length=dataset.sequence_length,
        rows_per_group=dataset.rows_per_group,
        lanes=lanes,
        window_blocks=window,
    )
    sources = tuple(SourceConfig(name=source.name, path="unused") for source in dataset.sources)
    return Order(dataset, data, CorpusConfig(sources=sources), dataset.sequence_length, seed=0)


# -- ours --------------------------------------------------------------------------------------------------------


def decode_rate(storage: Storage, dataset: DatasetManifest) -> float:
    layout = Layout.of(dataset)
    start, decoded = time.process_time(), 0
    for entry in open_index(storage, dataset).packed[0]:

        def fetch(first: int, last: int, entry: PackedFile = entry) -> bytes:
            return fetch_range(storage, entry, first, last)

        footer = read_footer(fetch, entry, layout)
        for group in range(footer.metadata.num_row_groups):
            decoded += read_group(fetch, entry, layout, footer, group)[0].tokens.size
    return decoded / (time.process_time() - start) / 1e6


def verify_rate(storage: Storage, dataset: DatasetManifest) -> float:
    """Decoding, and all that `jobs.verify` looks at besides: SHA-256, ids, document ends, padding."""
    start = time.process_time()
    checked = verify(dataset, storage)
    assert checked.rows == dataset.rows
    return checked.rows * ROW / (time.process_time() - start) / 1e6


def batch_rate(storage: Storage, dataset: DatasetManifest) -> float:
    start = time.process_time()
    rows = dataset.rows // BATCH * BATCH
    loader = Loader(order_of(dataset, lanes=16, window=2), storage, 0, 1, end=rows)
    for first in range(0, rows, BATCH):
        loader.batch(first, BATCH)
    loader.close()
    return rows * ROW / (time.process_time() - start) / 1e6


def read_amplification(storage: Storage, folder: Path, ranks: int) -> float:
    """Bytes that all ranks read in an epoch, footers included, over the bytes of the blocks. Blocks of 64 rows."""
    name = folder / "small.json"
    if not name.exists():
        tokens = np.fromfile(folder / "tokens.bin", dtype=np.uint16).reshape(-1, ROW)[: 8192 - 3 * 64]
        name.write_bytes(write_packed(storage, folder, tokens, "uint16", 64).to_json())
    dataset = DatasetManifest.model_validate_json(name.read_bytes())
    order = order_of(dataset, lanes=8, window=4)
    read, rows = 0, dataset.rows // 8 * 8
    for rank in range(ranks):
        loader = Loader(order, storage, rank, ranks, end=rows)
        for first in range(0, rows, BATCH):
            loader.batch(first, min(BATCH, rows - first))
        loader.close()
        read += loader.reader.counters.bytes
    amplification = read / sum(file.bytes for file in open_index(storage, dataset).packed[0])
    print(f"{ranks} ranks on 8 lanes: {amplification:.3f} bytes read per byte stored")
    return amplification


def shuffle() -> list[dict[str, Any]]:
    """Rows numbered by the property they are sorted by: how near batches come to random draws from the whole source."""
    print(
        f"\n{'lanes':>6s} {'window':>7s} {'group':>6s} {'batch':>6s} {'rows':>12s}  spread of batch means  rows sharing a block"
    )
    worst = 0.0
    for lanes, window, group, batch, rows, recommended in (
        (16, 4, 16, 16, 6_400, True),  # the debug preset
        (4096, 4, 256, 2048, 1 << 26, True),  # Moonlight
        (4096, 4, 256, 4096, 1 << 26, True),
        (1024, 4, 256, 1024, 1 << 24, True),
        (256, 4, 256, 1024, 1 << 23, True),
        (64, 4, 256, 1024, 1 << 22, False),  # lanes * window_blocks below the batch
        (64, 16, 256, 1024, 1 << 22, True),
    ):
        files = [PackedFile(path="none", bytes=0, sha256="", rows=rows, tokens=0, group_crc32="")]
        order = order_of(manifest([files], "uint16", ROW, group), lanes, window)
        row = order.locate(np.arange(min(200, rows // batch) * batch)).row.reshape(-1, batch)
        spread = float((row / rows).mean(axis=1).std() * (12 * batch) ** 0.5)
        sharing = 1 - np.mean([len(np.unique(blocks)) for blocks in row // group]) / batch
        worst = max(worst, spread) if recommended else worst
        print(f"{lanes:6d} {window:7d} {group:6d} {batch:6d} {rows:12,d}  {spread:21.2f}  {sharing:20.1%}")
    name = "loader: spread of batch means on sorted rows over the ideal, lanes * window_blocks >= batch, worst"
    return [result(name, worst, None, 1.2, worst <= 1.2)]


def seek() -> list[dict[str, Any]]:
    """45,000 packed files of five sources: open dataset and index (checked), build the order, find sequences."""
    files = [
        [
            PackedFile(
                path=f"datasets/packed/{i % 256:02x}/{s}-{i}",
                bytes=3 * 10**8,
                sha256="0" * 64,
                rows=65_536,
                tokens=268_000_000,
                group_crc32="0" * 2056,
            )
            for i in range(9000)
        ]
        for s in range(5)
    ]
    with tempfile.TemporaryDirectory(prefix="loader-benchmark-") as folder:
        storage = open_storage(StorageConfig(root=folder))
        made = manifest(files, "uint32", ROW, 256, storage)
        storage.write(dataset_path(made.identity), made.to_json())
        del files
        start, cpu = time.perf_counter(), time.process_time()
        dataset = read_dataset(storage, made.identity, made.digest)
        index = open_index(storage, dataset)
        cpu = time.process_time() - cpu
        assert sum(map(len, index.packed)) == 45_000
    size = dataset.files.bytes
    order = order_of(dataset, lanes=4096, window=4)
    order.locate(0)  # the first call warms numpy up
    opened = time.perf_counter() - start
    times = []
    for n in np.random.default_rng(0).integers(0, dataset.rows, 1000):
        start = time.thread_time()
        order.locate(n)
        times.append((time.thread_time() - start) * 1e3)
    memory = psutil.Process().memory_info().rss / 1e6
    print(
        f"\n{dataset.rows * ROW / 1e12:.2f} T tokens, {size / 1e6:.0f} MB of index: open {cpu:.2f} CPU-s, with the order {opened:.2f} s, seek median "
        f"{statistics.median(times):.2f} ms, worst {max(times):.2f} ms; memory of the process {memory:.0f} MB"
    )
    return [
        result("loader: open a dataset of 45,000 packed files, CPU-s", cpu, None, 0.3, cpu < 0.3),
        result("loader: seek in 5.7 T tokens, worst of 1,000, CPU ms", max(times), None, 5, max(times) < 5),
        result(
            "loader: memory with 5.7 T tokens open, interpreter and libraries included, MB",
            memory,
            None,
            500,
            memory < 500,
        ),
    ]


# -- peers -------------------------------------------------------------------------------------------------------


def memmap_rate(path: Path, rows: int) -> float:
    """Megatron's way: a flat file of ids, a shuffle index in memory, a copy per sample."""
    start = time.process_time()
    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    order = np.random.default_rng(0).permutation(rows)
    for first in range(0, rows // BATCH * BATCH, BATCH):
        batch = np.stack([tokens[row * ROW : (row + 1) * ROW].astype(np.int64) for row in order[first : first + BATCH]])
        torch.from_numpy(batch)
    return rows // BATCH * BATCH * ROW / (time.process_time() - start) / 1e6


def streaming_problem() -> str:
    try:
        import streaming  # noqa: F401
    except ImportError as error:
        return f"{error} (pip install mosaicml-streaming)"
    return ""


def write_streaming(folder: Path, tokens: np.ndarray) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"tokens": "bytes"}, compression="zstd:3", hashes=["xxh64"]) as writer:
        for row in tokens:
            writer.write({"tokens": row.tobytes()})


def streaming_rate(folder: Path, rows: int) -> float:
    from streaming import StreamingDataset

    local = folder / "mds-local"
    shutil.rmtree(local, ignore_errors=True)
    start = time.process_time()
    dataset = StreamingDataset(
        remote=str(folder / "mds"),
        local=str(local),
        shuffle=True,
        batch_size=BATCH,
        validate_hash="xxh64",
        num_canonical_nodes=1,
    )
    batch, seen = [], 0
    for sample in dataset:
        batch.append(np.frombuffer(sample["tokens"], dtype=np.uint16).astype(np.int64))
        if len(batch) == BATCH:
            torch.from_numpy(np.stack(batch))
            seen, batch = seen + BATCH, []
    return seen * ROW / (time.process_time() - start) / 1e6


if __name__ == "__main__":
    main()
