"""Rehearsals in processes of their own: a process has one stand-in device and one default process group."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.schema import RunConfig
from pipeline.model import offload
from pipeline.rehearsal.step import rehearse
from pipeline.rehearsal.tape import Collective, Entry
from tests.forks import fork
from tests.training.make import tiny

MESHES = {
    "ep 2 x efsdp 2": {"shard": 4, "ep": 2},
    "2 replicas of ep 2": {"replicate": 2, "shard": 2, "ep": 2},
    "ep 4": {"shard": 4, "ep": 4},
}


@dataclass(frozen=True)
class Seen:
    """What of a rehearsal leaves its process."""

    run: tuple[Entry, ...]
    whole: list[Entry]
    peak: int
    by_phase: dict[str, int]
    state_bytes: int
    held_at_peak: int
    too_much: Any
    host_waits: int
    tokens: int


def small(mesh: str, **overrides: Any) -> RunConfig:
    """Every token goes to every expert: even shares, as a rehearsal takes them to be."""
    config = tiny("nowhere", parallelism=MESHES[mesh], **{"training__micro_batch": 1, **overrides})
    return config.model_copy(update={"model": config.model.model_copy(update={"num_experts_per_tok": 4})})


def rehearsed(config: RunConfig, limit: int | None = None) -> Seen:
    _, pipe = fork(0, _tell, config, limit)
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError("the rehearsal failed: see its traceback") from None


def _tell(pipe: Connection, config: RunConfig, limit: int | None) -> None:
    pipe.send(_rehearse(config, limit))


def _rehearse(config: RunConfig, limit: int | None) -> Seen:
    if config.model.hidden_size < 1024:
        offload.LEAST = 1  # of a small network small storages are worth a copy
    found = rehearse(config, limit=limit)
    memory = found.memory
    return Seen(
        found.run, found.whole(), memory.peak, memory.by_phase, found.state_bytes,
        sum(size for _, size in memory.held_at_peak()), memory.too_much, len(found.host_waits()),
        found.tokens,
    )  # fmt: skip


NAMES = {
    "allreduce_": "all_reduce", "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter", "alltoall_base_": "all_to_all",
}  # fmt: skip


class Launched(TorchDispatchMode):
    """Every collective of a real rank: (name, bytes that leave it by a ring, ranks of the group)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = NAMES[func._schema.name.split("::")[1]]
            boxed = next(a for a in args if isinstance(a, torch.ScriptObject))
            group = dist.ProcessGroup.unbox(boxed)
            first = args[0][0] if isinstance(args[0], list) else args[0]
            size = {"reduce_scatter": args[1]}.get(name, first)
            count = size.numel() * size.element_size()
            sent = count * (group.size() - 1) // group.size() * (2 if name == "all_reduce" else 1)
            if name == "all_to_all":
                send, splits = args[1], args[4]
                row = send[0].numel() if send.dim() > 1 and len(send) else 1
                mine = splits[group.rank()] * row if splits else send.numel() // group.size()
                sent = (send.numel() - mine) * send.element_size()
            self.found.append((name, sent, group.size()))
        return func(*args, **(kwargs or {}))


def launched(entries: list[Entry]) -> list[tuple[str, int, int]]:
    return [(e.name, e.sent, len(e.ranks)) for e in entries if isinstance(e, Collective)]
