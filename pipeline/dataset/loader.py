"""Batches of training sequences for one rank, from the closed-form order and the block reader.

`batch(start, count)` is a pure function of (order, dataset, start, count, rank, world): training sequences n in
[start, start + count) with n % world == rank, in increasing n. The caller owns the only state, the next n. After each
batch the blocks of the following ones are read in the background; the following batches are guessed to be of the same
size, and a wrong guess costs reads, not correctness.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.dataset.order import Order
from pipeline.dataset.reader import BlockId, BlockReader
from pipeline.storage import Storage

BATCHES_AHEAD = 2  # whose blocks are read in the background
PLANNED_SEQUENCES = 4096  # located at a time, at least


class Batch(NamedTuple):
    """Legend: B sequences of this rank, S tokens each."""

    tokens_BS: torch.Tensor  # int64
    doc_lens: list[list[int]]  # per sequence, lengths of its documents or parts of documents; the rest is padding
    sequences: NDArray[np.int64]  # [B] training sequence numbers


class Plan(NamedTuple):
    """Where the sequences of a batch lie."""

    sequences: NDArray[np.int64]
    blocks: list[BlockId]
    rows: list[int]  # within the block
    parts: list[int]  # of the row

    def cut(self, i: int, j: int) -> Plan:
        return Plan(self.sequences[i:j], self.blocks[i:j], self.rows[i:j], self.parts[i:j])


class Loader:
    """Reads for one of `world` ranks and keeps at most `data.cache_bytes` of decoded blocks.

    `end`: the number of training sequences, if known; nothing beyond is read ahead.
    """

    def __init__(self, order: Order, storage: Storage, rank: int, world: int, end: int | None = None) -> None:
        assert 0 <= rank < world, (rank, world)
        self.order = order
        self.rank = rank
        self.world = world
        self.end = end
        self.reader = BlockReader(order.dataset, storage, order.data.cache_bytes)
        self._plans: dict[tuple[int, int], Plan] = {}  # of the batches expected next

    def batch(self, start: int, count: int) -> Batch:
        """Sequences [start, start + count) of this rank. Raises CorruptBlock where stored bytes are damaged."""
        plan = self._plans.get((start, count)) or self.plan(start, count)
        length, rows, parts = self.order.sequence_length, len(plan.sequences), self.order.parts
        tokens = np.empty((rows, length), dtype=np.int64)
        doc_lens = []
        for first in range(0, rows, self.reader.room):  # never more blocks in hand than the cache may hold
            some = slice(first, first + self.reader.room)
            data = self.reader.get(plan.blocks[some])
            for i, block, row, part in zip(range(rows)[some], plan.blocks[some], plan.rows[some], plan.parts[some]):
                found = data[block]
                lengths = found.document_lengths(row)
                if parts == 1:
                    tokens[i] = found.tokens[row]
                else:
                    tokens[i] = found.tokens[row, part * length : (part + 1) * length]
                    lengths = cut(lengths, part * length, (part + 1) * length)
                doc_lens.append(lengths)
        self._read_ahead(start, count)
        return Batch(torch.from_numpy(tokens), doc_lens, plan.sequences)

    def _read_ahead(self, start: int, count: int) -> None:
        """Plan and prefetch the batches that come next if they are of this size. Locating many at a time costs little more
        than locating one."""
        ahead = [start + number * count for number in range(1, BATCHES_AHEAD + 1)]
        if (ahead[-1], count) not in self._plans:
            batches = max(BATCHES_AHEAD, PLANNED_SEQUENCES * self.world // count)
            plan = self.plan(start + count, batches * count)
            starts = start + count * np.arange(1, batches + 2)
            bounds = np.searchsorted(plan.sequences, starts)
            self._plans = {(int(first), count): plan.cut(i, j) for first, i, j in zip(starts, bounds, bounds[1:])}
        for first in ahead:
            if self.end is None or first + count <= self.end:
                self.reader.prefetch(self._plans[first, count].blocks)

    def plan(self, start: int, count: int) -> Plan:
        """Where the sequences of `batch(start, count)` lie; reads nothing."""
        first = start + (self.rank - start) % self.world
        sequences = np.arange(first, start + count, self.world, dtype=np.int64)
        location = self.order.locate(sequences)
        number, row = np.divmod(location.row, self.order.rows_per_group)
        distinct, which = np.unique(np.stack([location.source, number]), axis=1, return_inverse=True)
        blocks = [BlockId(*block) for block in distinct.T.tolist()]
        return Plan(sequences, [blocks[i] for i in which.tolist()], row.tolist(), location.part.tolist())

    def close(self) -> None:
        self.reader.close()


def cut(doc_lens: list[int], start: int, stop: int) -> list[int]:
    """Lengths of the pieces of a row's documents that lie in its tokens [start, stop)."""
    pieces, position = [], 0
    for length in doc_lens:
        piece = min(position + length, stop) - max(position, start)
        if piece > 0:
            pieces.append(piece)
        position += length
    return pieces


def positions(doc_lens: list[list[int]], length: int) -> torch.Tensor:
    """[B, S] int64 position of each token within its document; padding counts on from its own start."""
    result = torch.empty((len(doc_lens), length), dtype=torch.int64)
    for row, lengths in enumerate(doc_lens):
        pieces = [*lengths, length - sum(lengths)]
        result[row] = torch.cat([torch.arange(piece) for piece in pieces])
    return result
