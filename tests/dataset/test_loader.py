"""Batches: the right bytes for every rank and batch schedule, from a folder and from an S3 server."""

import numpy as np
import pytest

from pipeline.config.schema import StorageConfig
from pipeline.dataset.loader import Loader, cut, positions
from pipeline.dataset.order import Order
from pipeline.storage import Storage, open_storage
from tests.dataset import make


@pytest.fixture
def storage(tmp_path) -> Storage:
    return open_storage(StorageConfig(root=str(tmp_path)))


@pytest.fixture
def order(storage: Storage) -> Order:
    dataset = make.write(storage, [[3, 5, 1], [2, 4]])
    return Order(dataset, make.layout(16, 4, lanes=4), make.corpus([2, 1], max_epochs=4), 16, seed=3)


def test_rows_are_those_the_order_names(storage: Storage, order: Order) -> None:
    loader = Loader(order, storage, 0, 1)
    batch = loader.batch(0, 60)
    location = order.locate(np.arange(60))
    assert batch.tokens_BS[:, :2].tolist() == [list(pair) for pair in zip(location.source, location.row)]
    for tokens, lengths in zip(batch.tokens_BS.tolist(), batch.doc_lens):
        ends = np.cumsum(lengths)
        assert all(tokens[end - 1] == make.EOS for end in ends if end > 2)
        assert set(tokens[ends[-1] :]) <= {make.EOS}
    loader.close()


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_ranks_and_batch_sizes_do_not_change_the_stream(storage: Storage, order: Order, world: int) -> None:
    loader = Loader(order, storage, 0, 1)
    expected = loader.batch(0, 96).tokens_BS
    loader.close()
    loaders = [Loader(order, storage, rank, world) for rank in range(world)]
    start = 0
    for count in (7, 1, 30, 20, 38):
        for loader in loaders:
            batch = loader.batch(start, count)
            assert batch.sequences.tolist() == [n for n in range(start, start + count) if n % world == loader.rank]
            assert batch.tokens_BS.equal(expected[batch.sequences])
        start += count
    for loader in loaders:
        loader.close()


def test_shorter_sequences_are_the_same_tokens_in_the_same_order(storage: Storage, order: Order) -> None:
    whole = Loader(order, storage, 0, 1)
    quarters = Loader(Order(order.dataset, order.data, make.corpus([2, 1]), 4, seed=3), storage, 0, 1)
    rows, parts = whole.batch(0, 24), quarters.batch(0, 96)
    assert parts.tokens_BS.reshape(24, 16).equal(rows.tokens_BS)
    for row in range(24):
        pieces = [sum(lengths) for lengths in parts.doc_lens[4 * row : 4 * row + 4]]
        assert sum(pieces) == sum(rows.doc_lens[row])
    whole.close()
    quarters.close()


def test_cache_bound_does_not_change_the_stream(storage: Storage, order: Order) -> None:
    tight = Order(order.dataset, order.data.model_copy(update={"cache_bytes": 1}), make.corpus([2, 1]), 16, seed=3)
    small, large = Loader(tight, storage, 0, 1), Loader(order, storage, 0, 1)
    for start in range(0, 64, 8):
        assert small.batch(start, 8).tokens_BS.equal(large.batch(start, 8).tokens_BS)
    assert small.reader.counters.blocks > large.reader.counters.blocks
    assert small.reader.room == 1
    small.close()
    large.close()


def test_a_large_batch_holds_no_more_blocks_than_the_cache(
    storage: Storage, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    block_bytes = 4 * 16 * 2
    tight = Order(
        order.dataset, order.data.model_copy(update={"cache_bytes": 3 * block_bytes}), make.corpus([2, 1]), 16, seed=3
    )
    small, large = Loader(tight, storage, 0, 1), Loader(order, storage, 0, 1)
    held, get = [], small.reader.get
    monkeypatch.setattr(small.reader, "get", lambda wanted: (held.append(len(set(wanted))), get(wanted))[1])
    batch = small.batch(0, 50)
    assert batch.tokens_BS.equal(large.batch(0, 50).tokens_BS)
    assert max(held) <= 3
    small.close()
    large.close()


def test_cut_and_positions() -> None:
    assert [cut([5, 3, 6], 4 * p, 4 * p + 4) for p in range(4)] == [[4], [1, 3], [4], [2]]
    assert positions([[3, 2], [6]], 6).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
