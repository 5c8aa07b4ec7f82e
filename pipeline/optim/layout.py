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
experts and dense weights jointly. Storage never depends on owners, hence neither do checkpoints.

Replicas of HSDP repeat each other's work or share it (`split_replicas`). An exchanged block that one of R replicas
works on travels within that replica only, and from each holder there to the R - 1 others: of S = P / W elements a rank
sends S / R to owners, its share of P / (W R) results back and S (R - 1) / R on, in all S (1 + 1 / R) instead of 2 S, for
an R-th of the work. So exchanged blocks are shared. LOCAL blocks send nothing while they are repeated; each that is
shared costs its worker R - 1 times its elements, so they are as far as `REPLICA_BUDGET` times the traffic of repeating
goes. Where few large matrices for many replicas would exceed it, exchanged blocks are repeated after all.

All layouts of a plan number the same ranks: dense (replicate, shard) and experts (replicate, efsdp, ep) are two views of
them, with shard = efsdp * ep.

Cost: O(blocks * ranks of an axis); the full model at 1,024 ranks takes a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache

from pipeline.config.schema import ParallelismConfig
from pipeline.optim.boxes import Box, Layout, block_boxes, intersect, numel
from pipeline.optim.newton_schulz import Backend, flops
from pipeline.optim.owners import Task, assign
from pipeline.optim.plan import Block, Bucket, MuonParameter, MuonPlan, Plan
from pipeline.optim.rules import Rule, match_rules
from pipeline.optim.sent import elements_sent

REPLICA_BUDGET = 2  # times 2 (P / W) (W - 1) / W elements, what a rank sends on average where replicas repeat the work


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
    split_local: bool = True,
    backend: Backend = "plain",
) -> MuonPlan:
    """Plans the step.

    Args:
        parameters: matrices and stacks with their layouts; all layouts number the same ranks (or none: one process).
        steps: Newton-Schulz steps, for costs.
        wire_bytes: bytes of an element on the wire.
        bucket_bytes: cap of what a rank sends or receives in one exchange of a bucket (at least one block, though).
        local_bytes: cap of a bucket of LOCAL blocks, if another one.
        split_replicas: replicas (HSDP) share exchanged blocks instead of repeating them,
        split_local: and LOCAL ones within `REPLICA_BUDGET`.
        backend: how Newton-Schulz is evaluated, for costs.

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
            cost = flops(box[-2][1] - box[-2][0], box[-1][1] - box[-1][0], steps, backend)
            work.append((names[0] if names else None, Block(index, box, cost, home)))
    world = max(sizes, default=1)
    loads, assigned = _assign(parameters, work, world, split_replicas)
    if split_replicas:
        repeated = [(axis, replace(block, replica=None)) for axis, block in assigned]
        budget = REPLICA_BUDGET * elements_sent(parameters, repeated, world).mean()
        if elements_sent(parameters, assigned, world).max() > budget:  # few large matrices for many replicas
            loads, assigned = _assign(parameters, work, world, split_replicas=False)
        if split_local:
            assigned = _share_local(parameters, assigned, loads, budget)
    buckets = _buckets(parameters, assigned, wire_bytes, bucket_bytes, local_bytes or bucket_bytes)
    return MuonPlan(tuple(parameters), tuple(plans), buckets, tuple(loads), split_replicas)


def _assign(
    parameters: Sequence[MuonParameter], work: list[tuple[str | None, Block]], world: int, split_replicas: bool
) -> tuple[list[int], list[tuple[str | None, Block]]]:
    """Chooses owner and replica of every exchanged block; the loads of all ranks."""
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
            if split_replicas and axis and len(ranks) > 1:
                found += [(owner, replica, [rank]) for replica, rank in enumerate(ranks)]
            else:
                found.append((owner, None, ranks))
        return found

    @cache
    def choices(layout: Layout, axis: str | None, home: tuple[int, ...]) -> tuple[int, ...]:
        """The ranks that stand for them: of replicas that repeat each other's work the first."""
        return tuple(ranks[0] for _, _, ranks in candidates(layout, axis, home))

    where = [(parameters[block.parameter].layout, axis, block.home) for axis, block in work]
    tasks = []
    for (axis, block), place in zip(work, where):
        if axis is None:  # where it is: on every replica that is there
            for rank in candidates(*place)[0][2]:
                loads[rank] += block.cost
        else:
            tasks.append(Task(block.cost, numel(block.box), choices(*place)))
    # Ranks that repeat what replica 0 does are left out.
    taking_part = range(world) if split_replicas else sorted(_of_replica_0(parameters, world))
    number = {rank: index for index, rank in enumerate(taking_part)}
    renumbered = {choice: tuple(number[rank] for rank in choice) for choice in {task.ranks for task in tasks}}
    tasks = [replace(task, ranks=renumbered[task.ranks]) for task in tasks]
    chosen = iter(assign(tasks, len(taking_part), [loads[rank] for rank in taking_part]))
    for (axis, block), place in zip(work, where):
        owner, replica, ranks = candidates(*place)[0 if axis is None else next(chosen)]
        if axis is not None:
            for rank in ranks:
                loads[rank] += block.cost
        assigned.append((axis, replace(block, owner=owner, replica=replica)))
    return loads, assigned


def _of_replica_0(parameters: Sequence[MuonParameter], world: int) -> set[int]:
    found = [{layout.rank(c) for c in layout.shard_coordinates()} for layout in {p.layout for p in parameters}]
    return set().union(*found) if found else set(range(world))


def _share_local(
    parameters: Sequence[MuonParameter], assigned: list[tuple[str | None, Block]], loads: list[int], most: float
) -> list[tuple[str | None, Block]]:
    """Gives LOCAL blocks to single replicas, each to the least loaded that then sends no more than `most` elements;
    updates the loads."""
    budget = most - elements_sent(parameters, assigned, len(loads))
    found = []
    for axis, block in sorted(assigned, key=lambda item: -item[1].cost) if budget.max(initial=0) > 0 else assigned:
        ranks = parameters[block.parameter].layout.replica_ranks(block.home) if axis is None else []
        price = numel(block.box) * (len(ranks) - 1)
        able = [rank for rank in ranks if budget[rank] >= price]
        if len(ranks) > 1 and able:
            worker = min(able, key=lambda rank: (loads[rank], -budget[rank]))
            budget[worker] -= price
            for rank in ranks:
                loads[rank] -= block.cost if rank != worker else 0
            block = replace(block, replica=ranks.index(worker))
        found.append((axis, block))
    return found


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
    sets: dict[tuple[bool, int, bool], list[Block]] = {}
    for axis, block in assigned:
        sets.setdefault((axis is None, axes.index(axis), block.replica is None), []).append(block)
    for (_, index, repeated), blocks in sorted(sets.items(), key=lambda item: item[0]):
        axis = axes[index]
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
                buckets.append(Bucket(axis, tuple(current), not repeated))
                current, filled = [], {}
            filled[worker] = filled.get(worker, 0.0) + size
            filled[sender] = filled.get(sender, 0.0) + sent
            current.append(block)
        buckets.append(Bucket(axis, tuple(current), not repeated))
    return tuple(buckets)


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
