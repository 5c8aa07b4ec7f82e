"""What a plan of the Muon step says: which blocks there are, who works on them, and how one rank sees that.

`layout.py` makes plans and explains the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pipeline.optim.boxes import Box, Layout, intersect


class Plan(Enum):
    LOCAL = "local"
    OWNED = "owned"
    REGROUP = "regroup"
    ADAMW = "adamw"


@dataclass(frozen=True)
class MuonParameter:
    """What the planner needs to know of one parameter."""

    fqn: str
    layout: Layout
    block_rows: int | None = None


@dataclass(frozen=True)
class Block:
    """One matrix and who works on it."""

    parameter: int  # index into MuonPlan.parameters
    box: Box
    cost: int  # floating-point operations of its Newton-Schulz
    home: tuple[int, ...]  # mesh coordinates of a holder in replica 0
    owner: int = 0  # coordinate on the bucket's axis
    replica: int | None = None  # which replica works on it; None: all of them do

    @property
    def matrix(self) -> tuple[int, int]:
        (r0, r1), (c0, c1) = self.box[-2:]
        return r1 - r0, c1 - c0


@dataclass(frozen=True)
class Bucket:
    """Blocks that are exchanged and orthogonalised together, over all groups of the axis."""

    axis: str | None  # mesh axis of the all-to-all; None: LOCAL
    blocks: tuple[Block, ...]
    shared: bool = False  # each block is one replica's work, and goes from it to the others


@dataclass(frozen=True)
class MuonPlan:
    parameters: tuple[MuonParameter, ...]
    plans: tuple[Plan, ...]  # of each parameter
    buckets: tuple[Bucket, ...]  # exchanges first
    loads: tuple[int, ...]  # Newton-Schulz operations of each rank
    split_replicas: bool

    @property
    def imbalance(self) -> float:
        """Busiest rank over the average one."""
        total = sum(self.loads)
        return max(self.loads) * len(self.loads) / total if total else 1.0

    @property
    def excess(self) -> float:
        """Busiest rank over the least it could have in any plan: the average, or the costliest matrix, as none is cut."""
        costliest = max((block.cost for bucket in self.buckets for block in bucket.blocks), default=0)
        least = max(sum(self.loads) / len(self.loads), costliest)
        return max(self.loads) / least if least else 1.0


@dataclass(frozen=True)
class Share:
    """A block as one group of an axis sees it."""

    block: Block
    members: list[Box]  # what each member of the group stores of the parameter

    def piece(self, member: int) -> Box | None:
        """What a member stores of the block."""
        return intersect(self.members[member], self.block.box)

    @property
    def pieces(self) -> tuple[Box | None, ...]:
        return tuple(self.piece(member) for member in range(len(self.members)))


@dataclass(frozen=True)
class BucketView:
    """A bucket as one rank sees it: the blocks of its own group on the axis, of all replicas."""

    axis: str | None
    me: int  # coordinate on the axis (0 for LOCAL)
    shares: tuple[Share, ...]
    shared: bool = False


def view(plan: MuonPlan, rank: int) -> tuple[BucketView, ...]:
    """The plan's buckets as `rank` executes them."""
    members: dict[tuple[Layout, str | None], list[Box]] = {}
    views = []
    for bucket in plan.buckets:
        shares = []
        me = 0
        for block in bucket.blocks:
            layout = plan.parameters[block.parameter].layout
            mine = layout.coordinates(rank)
            if bucket.axis:
                me = mine[layout.axis(bucket.axis)]
            if layout.group(bucket.axis, mine) != layout.group(bucket.axis, block.home):
                continue
            key = (layout, bucket.axis)
            if key not in members:
                members[key] = layout.member_boxes(bucket.axis, mine)
            shares.append(Share(block, members[key]))
        views.append(BucketView(bucket.axis, me, tuple(shares), bucket.shared))
    return tuple(views)
