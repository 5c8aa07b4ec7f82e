"""Moves the pieces of matrices to their owners and back: pack, one uneven all-to-all, assemble; and the way back.

For one bucket every rank knows every split from the plan, so sizes are never exchanged and nothing is padded; a rank
that has nothing to send or receive still enters the collective with zero-length splits. Buffers are flat and in the wire
dtype: bf16 costs nothing in accuracy because Newton-Schulz begins with that very cast and ends in bf16, and an
elementwise cast commutes with cutting and joining.

Bytes a rank sends per bucket: its own pieces of blocks that others own, plus, on the way back, the others' pieces of
blocks it owns. Summed over a step and balanced owners that is 2 * wire_bytes * (P / W) * (W - 1) / W for P elements on
an axis of W ranks. Sharing the result between HSDP replicas adds wire_bytes * (own elements) * (R - 1) / R.

Only `all_to_all_single` is used: it is the one collective that takes uneven and empty splits on gloo and NCCL alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.optim.boxes import Box, numel
from pipeline.optim.plan import Block, BucketView, Share

Handle = dist.Work | None


@dataclass(frozen=True)
class Piece:
    """Part of a block that this rank stores."""

    block: Block
    region: Box  # of the global parameter

    def of(self, local: Tensor, stored: Box) -> Tensor:
        """The piece as a 2-D view of the rank's local tensor, which holds the region `stored`."""
        offsets = [(a - origin, b - origin) for (a, b), (origin, _) in zip(self.region, stored, strict=True)]
        for start, _ in offsets[:-2]:
            local = local[start]
        (r0, r1), (c0, c1) = offsets[-2:]
        return local[r0:r1, c0:c1]


class Exchange:
    """The splits of one bucket on one rank; holds no tensors between steps.

    Args:
        bucket: the rank's view of the bucket.
        device: where the buffers live.
        group: process group of the bucket's axis; None for LOCAL buckets.
        replica: index of this rank's replica.
        replica_group: set if replicas share work (then the buckets of such work end with `share`).
        replicas: how many there are.
    """

    def __init__(
        self,
        bucket: BucketView,
        device: torch.device,
        group: dist.ProcessGroup | None,
        replica: int = 0,
        replica_group: dist.ProcessGroup | None = None,
        replicas: int = 1,
    ) -> None:
        replica_group = replica_group if bucket.shared else None
        self.device, self.group, self.replica_group = device, group, replica_group
        me = bucket.me
        members = range(dist.get_world_size(group) if group is not None else 1)
        active = [share for share in bucket.shares if share.block.replica in (None, replica)]
        outgoing = [[_piece(s, me) for s in active if s.block.owner == k and s.piece(me)] for k in members]
        self.owned = [share for share in active if share.block.owner == me]
        incoming = [[(i, s.piece(k)) for i, s in enumerate(self.owned)] for k in members]
        self.arrivals: list[tuple[int, Box]] = [(i, box) for row in incoming for i, box in row if box is not None]
        self.send_splits = [sum(numel(p.region) for p in row) for row in outgoing]
        self.receive_splits = [sum(numel(box) for _, box in row if box is not None) for row in incoming]
        self.pieces = [piece for row in outgoing for piece in row]
        self.other_pieces: list[Piece] = []
        self.replica_splits = [0] * replicas
        if replica_group is not None:
            stored = sorted((s for s in bucket.shares if s.piece(me)), key=lambda s: s.block.owner)  # as they pack them
            others = [[_piece(s, me) for s in stored if s.block.replica == r != replica] for r in range(replicas)]
            self.replica_splits = [sum(numel(p.region) for p in row) for row in others]
            self.other_pieces = [piece for row in others for piece in row]
        self.replica = replica

    def slots(self, buffer: Tensor) -> list[Tensor]:
        """A flat buffer of `sum(send_splits)` elements cut into 2-D views, one per piece."""
        return cut(buffer, [piece.region for piece in self.pieces])

    def forth(self, send: Tensor) -> tuple[Tensor, Handle]:
        """Pieces to their owners. The result may be read once the handle has been waited for."""
        return _all_to_all(send, self.send_splits, self.receive_splits, self.group)

    def back(self, send: Tensor) -> tuple[Tensor, Handle]:
        """Results to where the pieces are stored; the mirror of `forth`."""
        return _all_to_all(send, self.receive_splits, self.send_splits, self.group)

    def share(self, mine: Tensor) -> tuple[Tensor, Handle]:
        """This replica's results to all other replicas; theirs (in the order of `other_pieces`) come back."""
        copies = len(self.replica_splits) - 1
        splits = [0 if r == self.replica else mine.numel() for r in range(copies + 1)]
        return _all_to_all(mine.repeat(copies), splits, self.replica_splits, self.replica_group)

    def assemble(self, received: Tensor) -> list[Tensor]:
        """Whole matrices from the received pieces: one [B, M, N] batch per run of owned blocks of equal shape."""
        shapes = [share.block.matrix for share in self.owned]
        runs = [(shape, len(list(run))) for shape, run in groupby(shapes)]
        if self.group is None:  # every piece is a whole block, already in this order
            parts = received.split([count * rows * columns for (rows, columns), count in runs])
            return [part.view(count, *shape) for part, (shape, count) in zip(parts, runs)]
        batches = [received.new_empty((count, *shape)) for shape, count in runs]
        views = self._views(batches)
        if views:
            torch._foreach_copy_(views, cut(received, [box for _, box in self.arrivals]))
        return batches

    def disassemble(self, batches: Sequence[Tensor], wire: torch.dtype) -> Tensor:
        """The inverse of `assemble`: a flat buffer for `back`."""
        if self.group is None:
            flat = [batch.reshape(-1).to(wire) for batch in batches]
            return torch.cat(flat) if flat else torch.empty(0, dtype=wire, device=self.device)
        buffer = torch.empty(sum(self.receive_splits), dtype=wire, device=self.device)
        views = self._views(batches)
        if views:
            torch._foreach_copy_(cut(buffer, [box for _, box in self.arrivals]), views)
        return buffer

    def _views(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Each arrival as a view of the matrix it belongs to."""
        matrices = [matrix for batch in batches for matrix in batch.unbind(0)]
        found = []
        for index, box in self.arrivals:
            (r0, _), (c0, _) = self.owned[index].block.box[-2:]
            (a, b), (c, d) = box[-2:]
            found.append(matrices[index][a - r0 : b - r0, c - c0 : d - c0])
        return found


def cut(buffer: Tensor, regions: Sequence[Box]) -> list[Tensor]:
    """Consecutive 2-D views of a flat buffer, with the shapes of the regions."""
    sizes = [numel(region) for region in regions]
    starts = accumulate(sizes, initial=0)
    return [
        buffer[start : start + size].view(region[-2][1] - region[-2][0], region[-1][1] - region[-1][0])
        for start, size, region in zip(starts, sizes, regions)
    ]


def _piece(share: Share, member: int) -> Piece:
    region = share.piece(member)
    assert region is not None
    return Piece(share.block, region)


def _all_to_all(
    send: Tensor, send_splits: list[int], receive_splits: list[int], group: dist.ProcessGroup | None
) -> tuple[Tensor, Handle]:
    if group is None:
        return send, None
    received = send.new_empty(sum(receive_splits))
    work = dist.all_to_all_single(received, send, receive_splits, send_splits, group=group, async_op=True)
    return received, work
