"""What each rank puts on the wire in a Muon step, by arithmetic on the plan."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from pipeline.optim.boxes import Layout
from pipeline.optim.plan import Block, MuonParameter, MuonPlan

Array = np.ndarray[Any, np.dtype[Any]]


def elements_sent(
    parameters: Sequence[MuonParameter], assigned: Sequence[tuple[str | None, Block]], world: int
) -> Array:
    """Elements that each rank sends in a step: pieces to owners, results back, results to other replicas."""
    sent = np.zeros(world, np.int64)

    @cache
    def group(layout: Layout, axis: str | None, home: tuple[int, ...]) -> tuple[Array, Array]:
        """What the members store [K, dims, 2], and their ranks in all replicas [R, K]."""
        if axis is None:
            return np.array([layout.box(home)]), np.array([layout.replica_ranks(home)]).T
        position = layout.axis(axis)
        members = [(*home[:position], k, *home[position + 1 :]) for k in range(layout.axes[position][1])]
        return np.array([layout.box(m) for m in members]), np.array([layout.replica_ranks(m) for m in members]).T

    for axis, block in assigned:
        layout = parameters[block.parameter].layout
        if not layout.axes or (axis is None and block.replica is None):
            continue
        home = list(block.home)
        if axis:
            home[layout.axis(axis)] = 0
        boxes, ranks = group(layout, axis, tuple(home))
        box = np.array(block.box)
        stored = (np.minimum(boxes[..., 1], box[:, 1]) - np.maximum(boxes[..., 0], box[:, 0])).clip(min=0).prod(axis=1)
        out = stored.copy()
        out[block.owner] = stored.sum() - stored[block.owner]
        if block.replica is None:
            sent[ranks] += out
        else:
            sent[ranks[block.replica]] += out + stored * (len(ranks) - 1)
    return sent


def bytes_by_rank(plan: MuonPlan, wire_bytes: int) -> list[int]:
    """Bytes that each rank puts on the wire in a step."""
    assigned = [(bucket.axis, block) for bucket in plan.buckets for block in bucket.blocks]
    found: list[int] = (elements_sent(plan.parameters, assigned, len(plan.loads)) * wire_bytes).tolist()
    return found


def bytes_sent(plan: MuonPlan, rank: int, wire_bytes: int) -> int:
    return bytes_by_rank(plan, wire_bytes)[rank]
