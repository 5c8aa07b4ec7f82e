"""The plan that a run's settings ask for: whether replicas of HSDP share work, and how much of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pipeline.config.schema import MuonConfig
from pipeline.optim.layout import plan_muon
from pipeline.optim.plan import MuonParameter, MuonPlan
from pipeline.optim.sent import bytes_by_rank


def plan_of(parameters: Sequence[MuonParameter], config: MuonConfig, local_bytes: int | None = None) -> MuonPlan:
    """The plan that `optimizer.muon` asks for; with `hsdp_split: auto` replicas share what never loses."""
    wire_bytes = 2 if config.wire_dtype == "bf16" else 4
    make = partial(
        plan_muon,
        parameters,
        steps=config.newton_schulz_steps,
        wire_bytes=wire_bytes,
        bucket_bytes=config.bucket_bytes,
        local_bytes=local_bytes,
        backend=config.backend,
    )
    copies = {len(item.layout.replicas) for item in parameters}
    if config.hsdp_split == "on" and copies - {0}:
        return make(split_replicas=True)
    repeated = make()
    if config.hsdp_split == "off" or copies != {1}:
        return repeated
    shared = make(split_replicas=True, split_local=False)
    return shared if never_loses(repeated, shared) else repeated


def never_loses(repeated: MuonPlan, shared: MuonPlan) -> bool:
    """Whether sharing is less work in all, and no more for the busiest rank, nor more bytes for the fullest."""
    return (
        sum(shared.loads) < sum(repeated.loads)
        and max(shared.loads) <= max(repeated.loads)
        and max(bytes_by_rank(shared, 1)) <= max(bytes_by_rank(repeated, 1))
    )
