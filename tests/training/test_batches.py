"""Labels and micro-batches."""

import torch

from pipeline.dataset.loader import Loader
from pipeline.dataset.order import Order
from pipeline.storage import Storage
from pipeline.training.batches import labels_of, read_step
from tests.training.make import tiny, tiny_dataset

NONE = -100


def test_labels_are_the_next_tokens():
    tokens_BS = torch.tensor([[5, 6, 1, 7, 8, 1], [9, 4, 3, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    doc_lens = [[3, 3], [4], []]  # full row; padding; nothing but padding
    assert labels_of(tokens_BS, doc_lens, document_mask=False).tolist() == [
        [6, 1, 7, 8, 1, NONE],
        [4, 3, 1, NONE, NONE, NONE],
        [NONE] * 6,
    ]
    assert labels_of(tokens_BS, doc_lens, document_mask=True).tolist() == [
        [6, 1, NONE, 8, 1, NONE],
        [4, 3, 1, NONE, NONE, NONE],
        [NONE] * 6,
    ]


def test_ranks_share_a_step(tmp_path):
    """Two ranks together hold the rows that one rank holds alone."""
    config = tiny(str(tmp_path))
    storage = Storage(config.storage)
    order = Order.of_run(config, tiny_dataset(storage))
    steps = []
    for rank, world in [(0, 1), (0, 2), (1, 2)]:
        loader = Loader(order, storage, rank, world)
        steps.append(read_step(loader, 8, 8, 2, document_mask=True))
        loader.close()
    whole, even, odd = steps
    rows = lambda step: torch.cat([micro.tokens_BS for micro in step.micro_batches])  # noqa: E731
    assert [len(micro.tokens_BS) for micro in whole.micro_batches] == [2, 2, 2, 2]
    assert torch.equal(rows(whole)[0::2], rows(even))
    assert torch.equal(rows(whole)[1::2], rows(odd))
    assert whole.labels == even.labels + odd.labels
    assert whole.micro_batches[0].doc_lens == [even.micro_batches[0].doc_lens[0], odd.micro_batches[0].doc_lens[0]]
