"""A digest of a sharded state that does not depend on how it is sharded.

Two runs hold the same state exactly if every tensor has the same bytes, whatever the world size, the expert degree or
the files of the checkpoint. Gathering each tensor to hash it would move the whole state (190 GB for Moonlight). Instead
the unit of hashing is a row, the last dim of a tensor (one element for vectors): no layout here cuts a row. The digest
of a tensor is the sum modulo 2^128 of

    xxh3_128(bytes of the row, seed = xxh3_64(name) + index of the row)

over its rows, so ranks add up what they hold in any order and only 16 bytes per tensor travel. The index inside each
term makes the sum depend on where rows are. The digest of the state is the sha256 of the table of names, shapes, dtypes
and sums. That tells states apart that differ by accident; it is no defence against an adversary who may choose rows.

Cost: one pass over the local shards in the thread that writes the checkpoint, on blocks that are in the processor's
cache because they are written, too: 0.3 us a row and 0.03 ns a byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from pipeline.manifest import digest_of
from pipeline.parallel.local import local_part, local_tensor

MODULUS = 1 << 128
BLOCK = 256 * 1024  # bytes of rows that are looked at together: they stay in a core's cache


class RowSum:
    """The share of a tensor's sum that one box of it has; `add` takes the box's rows in order."""

    def __init__(self, name: str, shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> None:
        """`shape` is the tensor's; the box begins at `offsets` and has `sizes`."""
        assert len(shape) < 2 or sizes[-1] in (0, shape[-1]), f"{name}: a rank holds part of a row"
        rows = slice(None) if len(shape) < 2 else slice(-1)
        self._indices = iter(_global_indices(shape[rows], offsets[rows], sizes[rows]))
        self._seed = xxhash.xxh3_64_intdigest(name.encode())
        self.total = 0

    def add(self, rows: memoryview, width: int) -> None:
        """Whole rows of `width` bytes."""
        seed, total, hashed = self._seed, self.total, xxhash.xxh3_128_intdigest
        for start, index in zip(range(0, len(rows), width), self._indices):
            total += hashed(rows[start : start + width], (seed + index) & 0xFFFFFFFFFFFFFFFF)
        self.total = total % MODULUS


def row_bytes(tensor: Tensor) -> int:
    """Bytes of a row of the tensor (of an element of a vector or scalar)."""
    return tensor.element_size() * (tensor.shape[-1] if tensor.ndim > 1 else 1)


def blocks_of(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a contiguous CPU tensor without a copy, in blocks of whole rows."""
    data, step = as_bytes(tensor), block_bytes(tensor)
    for start in range(0, len(data), max(1, step)):
        yield data[start : start + step]


def block_bytes(tensor: Tensor) -> int:
    """Bytes of a block: whole rows, as many as BLOCK has room for, or one."""
    return max(1, BLOCK // max(1, row_bytes(tensor))) * row_bytes(tensor)


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    assert tensor.is_contiguous()
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else memoryview(b"")


def local_sums(state: dict[str, Tensor], rank: int) -> dict[str, int]:
    """This rank's share of each tensor's sum. Copies are counted once: by the first rank that holds them."""
    return {name: _local_sum(name, tensor) if _counts_here(tensor, rank) else 0 for name, tensor in state.items()}


def combine(shares: list[dict[str, int]], state: Mapping[str, Tensor]) -> str:
    """The digest of the state from the shares of all ranks (names, shapes and dtypes are part of it)."""
    return content_digest({
        name: (tensor.shape, tensor.dtype, sum(share[name] for share in shares)) for name, tensor in state.items()
    })  # fmt: skip


def content_digest(tensors: Mapping[str, tuple[Sequence[int], torch.dtype, int]]) -> str:
    """The digest of a state from shape, dtype and sum of each tensor."""
    return digest_of(
        {name: [list(shape), str(dtype), f"{total % MODULUS:032x}"] for name, (shape, dtype, total) in tensors.items()}
    )


def _counts_here(tensor: Tensor, rank: int) -> bool:
    if not isinstance(tensor, DTensor):
        return rank == 0
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    return all(
        index == 0 for index, placement in zip(coordinate, tensor.placements) if isinstance(placement, Replicate)
    )


def _local_sum(name: str, tensor: Tensor) -> int:
    window = local_part(tensor)
    local = local_tensor(tensor).detach().cpu().contiguous()
    rows = RowSum(name, tensor.shape, [part.start for part in window], local.shape)
    for block in blocks_of(local):
        rows.add(block, row_bytes(local))
    return rows.total


def _global_indices(shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Row-major index in the full tensor of each row of a box, in the box's order."""
    indices = torch.zeros((), dtype=torch.int64)
    for full, start, size in zip(shape, offsets, sizes):
        indices = indices.unsqueeze(-1) * full + torch.arange(start, start + size)
    found: list[int] = indices.reshape(-1).tolist()
    return found
