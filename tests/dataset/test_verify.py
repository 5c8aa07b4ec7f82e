"""`verify` and the loader against damage: any flipped bit is named by file and row group; broken invariants are named."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import StorageConfig
from pipeline.dataset.checks import check_block
from pipeline.dataset.packed_file import Block, CorruptBlock
from pipeline.dataset.reader import BlockId, BlockReader
from pipeline.dataset.verify import tasks_of, verify
from pipeline.file_index import open_index, write_index
from pipeline.manifest import DatasetManifest, FileEntry, HeldoutFile
from pipeline.packed import group_bounds
from pipeline.storage import Storage, open_storage
from tests.dataset import make


@pytest.fixture
def storage(tmp_path) -> Storage:
    return open_storage(StorageConfig(root=str(tmp_path)))


def read_everything(dataset: DatasetManifest, storage: Storage) -> list[str]:
    """What a loader that meets every block complains about."""
    reader = BlockReader(dataset, storage, 0)
    complaints = []
    for s, source in enumerate(dataset.sources):
        for number in range(source.rows // dataset.rows_per_group):
            try:
                reader.get([BlockId(s, number)])
            except CorruptBlock as error:
                complaints.append(str(error))
    reader.close()
    return complaints


def test_a_sound_dataset_verifies(storage: Storage) -> None:
    dataset = make.write(storage, [[3, 2], [1]])
    seen = []
    report = verify(dataset, storage, report=lambda done, total, file: seen.append((done, total)))
    assert report.ok, report.findings
    assert (report.files, report.rows, report.tokens) == (3, 24, dataset.tokens)
    assert report.bytes == sum(file.bytes for files in open_index(storage, dataset).packed for file in files)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert read_everything(dataset, storage) == []


@pytest.mark.timeout(1800)
def test_any_flipped_bit_is_named_by_file_and_row_group(storage: Storage) -> None:
    """200 random places, those in page headers, footer and magic numbers among them, for `verify` and for the loader."""
    dataset = make.write(storage, [[6, 5]], row_tokens=64)
    rng = np.random.default_rng(0)
    regions = set()
    for number in range(200):
        entry = make.packed_of(dataset, storage)[number % 2]
        good = storage.read(entry.path)
        bounds = group_bounds(pq.read_metadata(io.BytesIO(good)))
        position = number // 2 if number < 40 else int(rng.integers(len(good)))
        group = int(np.searchsorted(bounds, position, side="right")) - 1
        where = "footer" if position >= bounds[-1] else f"row group {group}"
        regions.add(where)
        damaged = bytearray(good)
        damaged[position] ^= 1 << int(rng.integers(8))
        storage.write(entry.path, bytes(damaged))

        findings = verify(dataset, storage).findings
        assert findings, (position, where)
        assert all(str(finding).startswith(f"{entry.path}: {where}: ") for finding in findings)
        complaints = read_everything(dataset, storage)
        assert complaints, (position, where)
        assert all(complaint.startswith(f"{entry.path}: {where}: ") for complaint in complaints)
        storage.write(entry.path, good)
    assert regions == {"footer", *(f"row group {group}" for group in range(6))}
    assert verify(dataset, storage).ok


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.99])
def test_truncated_and_missing_files_are_named(storage: Storage, keep: float) -> None:
    dataset = make.write(storage, [[6], [2]])
    entry = make.packed_of(dataset, storage)[0]
    data = storage.read(entry.path)
    storage.write(entry.path, data[: int(keep * len(data)) if keep < 1 else int(keep)])
    assert [finding.path for finding in verify(dataset, storage).findings] == [entry.path]
    assert all(complaint.startswith(entry.path) for complaint in read_everything(dataset, storage))
    Path(storage.key(entry.path)).unlink()
    assert [str(finding) for finding in verify(dataset, storage).findings] == [f"{entry.path}: the file is missing"]


def test_totals_are_compared_with_the_manifest(storage: Storage) -> None:
    dataset = make.write(storage, [[2], [1]])
    source = dataset.sources[0]
    wrong = dataset.model_copy(
        update={"sources": (source.model_copy(update={"tokens": source.tokens + 1, "rows": 4}), dataset.sources[1])}
    )
    assert [str(finding) for finding in verify(wrong, storage).findings] == [
        f"source s0: {source.tokens} tokens, the manifest says {source.tokens + 1}",
        "source s0: 8 rows, the manifest says 4",
    ]
    packed = [list(files) for files in open_index(storage, dataset).packed]
    entry = packed[0][0].model_copy(update={"tokens": 5})
    files = write_index(storage, "datasets/test/other.arrow", [{"packed": [entry]}, {"packed": packed[1]}])
    wrong = dataset.model_copy(update={"files": files})
    assert [str(finding) for finding in verify(wrong, storage).findings] == [
        f"{entry.path}: {source.tokens} tokens, the manifest says 5"
    ]


@pytest.mark.parametrize(
    ("tokens", "lengths", "problem"),
    [
        ([5, 6, 1, 7, 8, 1, 1, 1], [3, 3], ""),
        ([5, 6, 7, 8, 9, 10, 11, 12], [8], ""),  # a piece of a long document fills the row
        ([5, 6, 1, 7, 8, 9, 9, 9], [3, 5], ""),  # the last document goes on in another row
        ([1, 1, 1, 1, 1, 1, 1, 1], [], ""),
        ([5, 6, 1, 7, 8, 1, 1, 1], [6], "row 1: EOS inside a document"),
        ([5, 6, 7, 7, 8, 1, 1, 1], [3, 3], "row 1: a document ends without EOS"),
        ([5, 6, 1, 7, 8, 1, 2, 1], [3, 3], "row 1: padding that is not EOS"),
        ([5, 6, 1, 7, 50, 1, 1, 1], [3, 3], "row 1: token 50 is outside the vocabulary of 50"),
        ([5, 6, 1, 7, 8, 1, 1, 1], [3, 6], "row 1: documents of 9 tokens in a row of 8"),
        ([5, 6, 1, 7, 8, 1, 1, 1], [3, 0, 3], "row 1: a document of 0 tokens"),
    ],
)
def test_row_invariants(tokens: list[int], lengths: list[int], problem: str) -> None:
    sound = [5, 6, 7, 1, 1, 1, 1, 1]
    block = Block(
        np.array([sound, tokens, sound], dtype=np.uint16),
        np.array([4, *lengths, 4], dtype=np.int32),
        np.array([0, 1, 1 + len(lengths), 2 + len(lengths)], dtype=np.int32),
    )
    found, ended = check_block(block, eos_id=1, vocab_size=50)
    assert found == problem
    if not problem:
        assert ended == 2 + sum(tokens[end - 1] == 1 for end in np.cumsum(lengths))


def heldout(storage: Storage, documents: list[tuple[list[int], int]]) -> HeldoutFile:
    table = pa.table(
        {
            "tokens": pa.array([np.array(tokens, dtype="<u2").tobytes() for tokens, _ in documents], pa.binary()),
            "n_bytes": pa.array([n_bytes for _, n_bytes in documents], pa.int64()),
            "doc_id": [f"d{i}" for i in range(len(documents))],
        }
    )
    out = io.BytesIO()
    pq.write_table(table, out)
    path = "datasets/test/heldout/s0.parquet"
    storage.write(path, out.getvalue())
    return HeldoutFile(
        **entry_of(storage, path).model_dump(),
        documents=len(documents),
        tokens=sum(len(tokens) for tokens, _ in documents),
        text_bytes=sum(n_bytes for _, n_bytes in documents),
    )


def entry_of(storage: Storage, path: str) -> FileEntry:
    data = storage.read(path)
    return FileEntry(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def test_heldout_tokenizer_and_other_files(storage: Storage) -> None:
    dataset = make.write(storage, [[1]])
    storage.write("datasets/test/documents/s0.parquet", b"ragged")
    storage.write("tokenizers/t/tokenizer.json", b"{}")
    source = dataset.sources[0]
    documents = [entry_of(storage, "datasets/test/documents/s0.parquet")]
    indexed = {"packed": list(make.packed_of(dataset, storage)), "documents": documents}
    files = write_index(storage, "datasets/test/other.arrow", [indexed])

    def with_heldout(entry: HeldoutFile) -> DatasetManifest:
        counts = source.counts.model_copy(update={"docs_in": 10**6 + 2, "heldout": 2})
        mine = source.model_copy(update={"heldout": (entry,), "counts": counts})
        tokenizer = dataset.tokenizer.model_copy(update={"files": (entry_of(storage, "tokenizers/t/tokenizer.json"),)})
        return dataset.model_copy(update={"sources": (mine,), "tokenizer": tokenizer, "files": files})

    good = with_heldout(heldout(storage, [([5, 6], 9), ([7], 4)]))
    assert verify(good, storage).findings == ()
    assert len(tasks_of(good, open_index(storage, good))) == 4
    for documents, problem in (
        ([([5, make.EOS], 9), ([7], 4)], "row group 0: a held-out document contains EOS"),
        ([([5, 60_000], 9), ([7], 4)], "row group 0: token 60000 is outside the vocabulary"),
        ([([5, 6], 0), ([7], 4)], "row group 0: a held-out document of 0 bytes"),
    ):
        bad = with_heldout(heldout(storage, documents))
        assert [str(finding) for finding in verify(bad, storage).findings] == [
            f"datasets/test/heldout/s0.parquet: {problem}"
        ]
    storage.write("datasets/test/documents/s0.parquet", b"rugged")
    storage.write("tokenizers/t/tokenizer.json", b"{ }")
    findings = [str(finding) for finding in verify(bad, storage).findings]
    assert findings[0].startswith("datasets/test/documents/s0.parquet: SHA-256 is ")
    assert findings[-1] == "tokenizers/t/tokenizer.json: 3 bytes, expected 2"


def test_a_heldout_document_among_the_rows_is_named(storage: Storage) -> None:
    dataset = make.write(storage, [[2, 3]], row_tokens=256)
    reader = BlockReader(dataset, storage, 0)
    block = reader.get([BlockId(0, 3)])[BlockId(0, 3)]
    reader.close()
    row, length = next((row, block.document_lengths(row)[0]) for row in range(4) if block.document_lengths(row)[0] > 32)
    leaked = heldout(storage, [(block.tokens[row, : length - 1].tolist(), 99)])
    source = dataset.sources[0]
    counts = source.counts.model_copy(update={"docs_in": source.counts.docs_in + 1, "heldout": 1})
    changed = source.model_copy(update={"heldout": (leaked,), "counts": counts})
    assert [
        str(finding) for finding in verify(dataset.model_copy(update={"sources": (changed,)}), storage).findings
    ] == [
        f"{make.packed_of(dataset, storage)[1].path}: row group 1: row {row}: document 'd0' of source s0 is held out, but it is among the training rows"
    ]
