"""The block cache: bounded, shared by threads, read once, unmoved by failures."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipeline.config.schema import StorageConfig
from pipeline.dataset.reader import BlockId, BlockReader
from pipeline.storage import Storage, open_storage
from tests.dataset import make


@pytest.fixture
def storage(tmp_path) -> Storage:
    return open_storage(StorageConfig(root=str(tmp_path)))


def test_threads_that_want_the_same_blocks_read_them_once(storage: Storage) -> None:
    dataset = make.write(storage, [[8, 8], [8]])
    reader = BlockReader(dataset, storage, cache_bytes=1 << 20)
    wanted = [BlockId(s, number) for s, count in ((0, 16), (1, 8)) for number in range(count)]
    rng = np.random.default_rng(0)
    orders = [[wanted[i] for i in rng.permutation(len(wanted))] for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(reader.get, orders))
    assert reader.counters.blocks == len(wanted)
    assert reader.counters.footers == 3
    for result in results:
        for (s, number), block in result.items():
            assert block.tokens[:, 0].tolist() == [s] * 4
            assert block.tokens[:, 1].tolist() == list(range(4 * number, 4 * number + 4))
    reader.close()


def test_find_is_arithmetic_over_the_files(storage: Storage) -> None:
    dataset = make.write(storage, [[3, 1, 2]])
    reader = BlockReader(dataset, storage, 0)
    found = [reader.find(BlockId(0, number)) for number in range(6)]
    assert [(entry.path[-12:], group) for entry, group in found] == [
        ("s0-0.parquet", 0), ("s0-0.parquet", 1), ("s0-0.parquet", 2), ("s0-1.parquet", 0), ("s0-2.parquet", 0), ("s0-2.parquet", 1),
    ]  # fmt: skip
    with pytest.raises(AssertionError):
        reader.find(BlockId(0, 6))


def test_least_recently_used_blocks_leave_first(storage: Storage) -> None:
    dataset = make.write(storage, [[8]])
    size = largest_block(dataset, storage)
    reader = BlockReader(dataset, storage, cache_bytes=3 * size)
    for number in (0, 1, 2, 0, 3):  # 3 pushes out 1
        reader.get([BlockId(0, number)])
    before = reader.counters.blocks
    reader.get([BlockId(0, number) for number in (0, 2, 3)])
    assert reader.counters.blocks == before
    reader.get([BlockId(0, 1)])
    assert reader.counters.blocks == before + 1
    assert len(reader.get([BlockId(0, number) for number in range(8)])) == 8  # a request larger than the cache
    reader.close()


def test_prefetched_blocks_are_not_read_again(storage: Storage) -> None:
    dataset = make.write(storage, [[8]])
    reader = BlockReader(dataset, storage, cache_bytes=1 << 20)
    reader.prefetch([BlockId(0, number) for number in range(5)])
    reader.get([BlockId(0, number) for number in range(5)])
    assert reader.counters.blocks == 5
    reader.close()


def test_a_failed_read_is_tried_again_by_the_next_request(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make.write(storage, [[4]])
    reader = BlockReader(dataset, storage, cache_bytes=1 << 20)
    broken = threading.Event()
    read = storage.fs.cat_file

    def flaky(path: str, start: int | None = None, end: int | None = None) -> bytes:
        if broken.is_set():
            raise ConnectionError("the network is away")
        return read(path, start=start, end=end)

    monkeypatch.setattr(storage.fs, "cat_file", flaky)
    broken.set()
    for _ in range(2):
        with pytest.raises(ConnectionError, match="the network is away"):
            reader.get([BlockId(0, 1)])
    reader.prefetch([BlockId(0, 2)])  # fails in the background, without consequence
    broken.clear()
    assert len(reader.get([BlockId(0, 1), BlockId(0, 2)])) == 2
    reader.close()


def test_bytes_hurt_on_the_way_are_read_a_second_time(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make.write(storage, [[2]])
    reader = BlockReader(dataset, storage, cache_bytes=1 << 20)
    clean = reader.get([BlockId(0, 0)])[BlockId(0, 0)]
    read, calls = storage.fs.cat_file, []

    def hurt_once(path: str, start: int | None = None, end: int | None = None) -> bytes:
        data = bytearray(read(path, start=start, end=end))
        calls.append(start)
        data[len(data) // 2] ^= len(calls) == 1
        return bytes(data)

    monkeypatch.setattr(storage.fs, "cat_file", hurt_once)
    block = reader.get([BlockId(0, 1)])[BlockId(0, 1)]
    assert len(calls) == 2
    assert block.tokens[:, 1].tolist() == [4, 5, 6, 7]
    assert clean.tokens.shape == block.tokens.shape
    reader.close()


def largest_block(dataset, storage: Storage) -> int:
    reader = BlockReader(dataset, storage, 1 << 20)
    size = max(block.nbytes for block in reader.get([BlockId(0, number) for number in range(8)]).values())
    reader.close()
    return size
