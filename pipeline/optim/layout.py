"""Who orthogonalises which matrix: a pure-Python planner.

Muon needs whole matrices; FSDP2 and expert parallelism store slices. The planner looks at global shapes and at how each
mesh axis cuts them, never at tensors or process groups, so the same code plans a real step, a property test and a
512-GPU cluster on a laptop.

Vocabulary (boxes and layouts: `boxes.py`)
- A *block* is a matrix that is orthogonalised as a unit: a whole weight, one expert of a stack, one head.
- A parameter's *plan* follows from its layout alone:
    LOCAL    every block lies inside one rank's box: no communication (experts on `Shard(0)`, one process);
    OWNED    a matrix cut by one mesh axis: its pieces travel to one owner on that axis and back;
    REGROUP  the same for stacks and heads: blocks cut inside by an axis, or fewer blocks than ranks (EP * EFSDP >
             experts), where some ranks would otherwise idle;
    ADAMW    not orthogonalised.
- A *bucket* is a set of blocks handled together: one all-to-all there, Newton-Schulz, one back. Its size is capped, so
  transient memory does not grow with the model.

Owners are chosen by `owners.py`: level in Newton-Schulz cost, on top of the fixed cost of LOCAL blocks, and in bytes;
experts and dense weights jointly. Storage never depends on owners, hence neither do checkpoints. With `split_replicas`
the replicas of HSDP share the blocks, too.

All layouts of a plan number the same ranks: dense (replicate, shard) and experts (replicate, efsdp, ep) are two views of
them, with shard = efsdp * ep.

Cost: O(blocks * ranks of an axis); the full model at 512 ranks takes a few seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache, lru_cache

from pipeline.config.schema import ParallelismConfig
from pipeline.optim.boxes import Box, Layout, block_boxes, intersect, numel
from pipeline.optim.newton_schulz import flops
from pipeline.optim.owners import Task, assign
from pipeline.optim.rules import Rule, match_rules


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


@dataclass(frozen=True)
class MuonPlan:
    parameters: tuple[MuonParameter, ...]
    plans: tuple[Plan, ...]  # of each parameter
    buckets: tuple[Bucket, ...]  # exchanges first
    loads: tuple[int, ...]  # Newton-Schulz operations of each rank
    split_replicas: bool

    @property
    def imbalance(self) -> float:
        """Busiest rank over the average one (of ranks that share the work)."""
        total = sum(self.loads)
        return max(self.loads) * len(self.loads) / total if total else 1.0


@dataclass(frozen=True)
class Share:
    """A block as one group of an axis sees it: `pieces[k]` is what member k stores of it."""

    block: Block
    pieces: tuple[Box | None, ...]


@dataclass(frozen=True)
class BucketView:
    """A bucket as one rank sees it: the blocks of its own group on the axis, of all replicas."""

    axis: str | None
    me: int  # coordinate on the axis (0 for LOCAL)
    shares: tuple[Share, ...]


@lru_cache(maxsize=256)
def _geometry(
    layout: Layout, block_rows: int | None
) -> tuple[tuple[int, ...], tuple[tuple[Box, tuple[int, ...]], ...]]:
    """Axes (indices) along which blocks have to be exchanged, and each block with the coordinates of one holder."""
    boxes = list(block_boxes(layout.shape, block_rows))
    shards = [(layout.box(c), c) for c in layout.shard_coordinates()]
    holders = [[c for box, c in shards if intersect(box, block)] for block in boxes]
    cutting = [a for a in layout.cut_order if layout.axes[a][1] > 1]
    exchanged: tuple[int, ...] = tuple(a for a in cutting if any(len({c[a] for c in found}) > 1 for found in holders))
    if not exchanged and len(shards) > len(boxes):
        exchanged = tuple(cutting[-1:])  # whole blocks, but too few: the axis that cuts last shares them out
    return exchanged, tuple((box, found[0]) for box, found in zip(boxes, holders, strict=True))


def plan_muon(
    parameters: Sequence[MuonParameter],
    *,
    steps: int = 5,
    wire_bytes: int = 2,
    bucket_bytes: int = 128 * 2**20,
    local_bytes: int | None = None,
    split_replicas: bool = False,
) -> MuonPlan:
    """Plans the step.

    Args:
        parameters: matrices and stacks with their layouts; all layouts number the same ranks (or none: one process).
        steps: Newton-Schulz steps, for costs.
        wire_bytes: bytes of an element on the wire.
        bucket_bytes: cap of what a rank sends or receives in one exchange of a bucket (at least one block, though).
        local_bytes: cap of a bucket of LOCAL blocks, if another one.
        split_replicas: replicas (HSDP) share the blocks instead of repeating them.

    Raises:
        ValueError: a layout whose matrices are cut by more than one mesh axis, or meshes of different sizes.
    """
    sizes = {p.layout.world for p in parameters if p.layout.axes}
    if len(sizes) > 1:
        raise ValueError(f"meshes of one optimizer must number the same ranks, found sizes {sorted(sizes)}")
    plans: list[Plan] = []
    work: list[tuple[str | None, Block]] = []
    for index, parameter in enumerate(parameters):
        layout = parameter.layout
        exchanged, found = _geometry(layout, parameter.block_rows)
        names = [layout.axes[a][0] for a in exchanged]
        if len(names) > 1:
            raise ValueError(
                f"parameter {parameter.fqn!r} {layout.shape}: mesh axes {names} both cut through its matrices, but Muon "
                f"exchanges along one; let all but one of them cut between matrices (dim 0 of a stack) or not at all"
            )
        whole = len(layout.shape) == 2 and parameter.block_rows is None
        plans.append(Plan.LOCAL if not names else Plan.OWNED if whole else Plan.REGROUP)
        for box, home in found:
            cost = flops(box[-2][1] - box[-2][0], box[-1][1] - box[-1][0], steps)
            work.append((names[0] if names else None, Block(index, box, cost, home)))
    loads, assigned = _assign(parameters, work, max(sizes, default=1), split_replicas)
    buckets = _buckets(parameters, assigned, wire_bytes, bucket_bytes, local_bytes or bucket_bytes)
    return MuonPlan(tuple(parameters), tuple(plans), buckets, tuple(loads), split_replicas)


def _assign(
    parameters: Sequence[MuonParameter], work: list[tuple[str | None, Block]], world: int, split_replicas: bool
) -> tuple[list[int], list[tuple[str | None, Block]]]:
    """Chooses owner and replica of every block."""
    loads = [0] * world
    assigned: list[tuple[str | None, Block]] = []

    @cache
    def candidates(layout: Layout, axis: str | None, home: tuple[int, ...]) -> list[tuple[int, int | None, list[int]]]:
        """(owner, replica, ranks that would do the work) of every possible choice."""
        if not layout.axes:
            return [(0, None, list(range(world)))]
        position = layout.axis(axis) if axis else None
        found: list[tuple[int, int | None, list[int]]] = []
        for owner in range(layout.axes[position][1]) if position is not None else (0,):
            at = list(home)
            if position is not None:
                at[position] = owner
            ranks = layout.replica_ranks(at)
            if split_replicas and len(ranks) > 1:
                found += [(owner, replica, [rank]) for replica, rank in enumerate(ranks)]
            else:
                found.append((owner, None, ranks))
        return found

    options = [candidates(parameters[block.parameter].layout, axis, block.home) for axis, block in work]
    # Replicas that repeat each other's work are alike: the first stands for all.
    tasks = [
        Task(block.cost, numel(block.box) if axis else 0, tuple(ranks[0] for _, _, ranks in found))
        for (axis, block), found in zip(work, options)
    ]
    for (axis, block), found, choice in zip(work, options, assign(tasks, world)):
        owner, replica, ranks = found[choice]
        for rank in ranks:
            loads[rank] += block.cost
        assigned.append((axis, replace(block, owner=owner, replica=replica)))
    return loads, assigned


def _buckets(
    parameters: Sequence[MuonParameter],
    assigned: list[tuple[str | None, Block]],
    wire_bytes: int,
    bucket_bytes: int,
    local_bytes: int,
) -> tuple[Bucket, ...]:
    """Packs blocks into capped buckets. Every rank of a mesh gets the same number of buckets, even where one is empty
    for its group, so that all ranks enter the same collectives in the same order."""
    buckets: list[Bucket] = []
    axes = list(dict.fromkeys(axis for axis, _ in assigned))
    for axis in sorted(axes, key=lambda name: (name is None, axes.index(name))):
        blocks = [block for name, block in assigned if name == axis]
        cap = max([bucket_bytes if axis else local_bytes, *(numel(block.box) * wire_bytes for block in blocks)])
        # The n-th blocks of all owners stand together, so that a bucket gives every owner its share; costly shapes first.
        queue: dict[tuple[object, ...], int] = {}
        keyed = []
        for block in sorted(blocks, key=lambda b: (-b.cost, b.matrix)):
            layout = parameters[block.parameter].layout
            worker = (*layout.group(axis, block.home), block.owner, block.replica)
            queue[worker] = queue.get(worker, 0) + 1
            keyed.append((queue[worker], worker, block))
        keyed.sort(key=lambda item: item[0])
        current: list[Block] = []
        filled: dict[tuple[object, ...], float] = {}
        for _, worker, block in keyed:
            layout = parameters[block.parameter].layout
            size = numel(block.box) * wire_bytes
            # Received by the worker; sent in equal pieces by its group, whose replicas may then exchange them all.
            sent = size / layout.axes[layout.axis(axis)][1] if axis else size
            sender = ("send", *layout.group(axis, block.home))
            if filled.get(worker, 0.0) + size > cap or filled.get(sender, 0.0) + sent > cap:
                buckets.append(Bucket(axis, tuple(current)))
                current, filled = [], {}
            filled[worker] = filled.get(worker, 0.0) + size
            filled[sender] = filled.get(sender, 0.0) + sent
            current.append(block)
        buckets.append(Bucket(axis, tuple(current)))
    return tuple(buckets)


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
            shares.append(Share(block, tuple(intersect(box, block.box) for box in members[key])))
        views.append(BucketView(bucket.axis, me, tuple(shares)))
    return tuple(views)


def bytes_sent(plan: MuonPlan, rank: int, wire_bytes: int) -> int:
    """Bytes that `rank` puts on the wire in a step: pieces to owners, results back, results to other replicas."""
    elements = 0
    for bucket in view(plan, rank):
        for share in bucket.shares:
            layout = plan.parameters[share.block.parameter].layout
            stored = [numel(piece) if piece else 0 for piece in share.pieces]
            ranks = layout.replica_ranks(layout.coordinates(rank))
            if share.block.replica not in (None, ranks.index(rank)):
                continue
            elements += sum(stored) - stored[bucket.me] if share.block.owner == bucket.me else stored[bucket.me]
            if share.block.replica is not None:
                elements += stored[bucket.me] * (len(ranks) - 1)
    return elements * wire_bytes


def sharded_parameters(
    shapes: Sequence[tuple[str, tuple[int, ...]]], rules: Sequence[Rule], parallelism: ParallelismConfig
) -> list[MuonParameter]:
    """The Muon parameters of a network as `pipeline.parallel.shard` would cut them, without any ranks: for planning.

    `shapes` are all parameters by name. Matrices are cut by dim 0 over `shard`; stacks by dim 0 over `ep`, then over
    `efsdp` by dim 0 while every rank gets an expert, else by dim 1.
    """
    replicate = (("replicate", parallelism.replicate),) if parallelism.replicate > 1 else ()
    copied = (None,) * len(replicate)
    dense = (*replicate, ("shard", parallelism.shard))
    found = []
    for (fqn, shape), rule in zip(shapes, match_rules(shapes, rules)):
        if rule.treatment != "muon":
            continue
        dim = 0 if len(shape) == 2 or shape[0] >= parallelism.shard else 1
        layout = Layout(shape, dense, (*copied, dim))
        if len(shape) == 3 and parallelism.ep > 1:
            axes = (*replicate, ("efsdp", parallelism.efsdp), ("ep", parallelism.ep))
            outer, last = tuple(range(len(replicate))), len(axes) - 1
            layout = Layout(shape, axes, (*copied, dim, 0), (*outer, last, last - 1))
        found.append(MuonParameter(fqn, layout, rule.block_rows))
    return found


def splitting_pays(repeated: MuonPlan, split: MuonPlan, stored: int) -> bool:
    """Whether sharing the work between replicas saves more time than the exchange of its results takes.

    An estimate for H100-class nodes: 550 TFLOP/s of Newton-Schulz against 50 GB/s of network per rank, for `stored`
    Muon elements on a rank, whose bf16 updates each replica receives once.
    """
    saved = (max(repeated.loads, default=0) - max(split.loads, default=0)) / 550e12
    return saved > 2 * stored / 50e9
