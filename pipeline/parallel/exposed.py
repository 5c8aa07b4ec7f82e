"""Exposed communication: the time in which a rank does nothing but wait for an exchange, or pack and unpack for one.

What is hidden behind computation costs nothing and is not counted. Where a rank enters such a stretch it marks the clock of
its device and does so again where it leaves: on CUDA two events on the stream that computes, whose distance is known once
the device has passed both, on a CPU the host's clock. Marking waits for nothing (0.5 us; 2 us on CUDA).

FSDP2 has no hook around its waits, so the methods of each of its groups that launch and await gathers and reductions are
wrapped; their copies into and out of the flat buffers, which only the exchange needs, are part of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo

from pipeline.model.devices import is_gpu

GATHERS = ("unshard", "wait_for_unshard")  # methods of FSDPParamGroup
REDUCES = ("post_backward", "finalize_backward")


class HostClock:
    """Marks are seconds."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def free(self, mark: float) -> None:
        """The mark is needed no more."""


class DeviceClock:
    """Marks are events on the current stream; they may be read once the device has passed them."""

    def __init__(self, device: torch.device) -> None:
        self._make: Callable[[], Any] = lambda: getattr(torch, device.type).Event(enable_timing=True)
        self._unused: list[Any] = []

    def mark(self) -> Any:
        event = self._unused.pop() if self._unused else self._make()
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1000

    def free(self, mark: Any) -> None:
        self._unused.append(mark)


Clock = HostClock | DeviceClock


def clock_of(device: torch.device) -> Clock:
    return DeviceClock(device) if is_gpu(device) else HostClock()


class Exposed:
    """`with exposed:` around what waits. Off, and free, until `start`; of nested ones the outer counts."""

    def __init__(self) -> None:
        self._clock: Clock | None = None
        self._depth = 0
        self._begin: Any = None
        self._spans: list[tuple[Any, Any]] = []

    def start(self, clock: Clock) -> None:
        self._clock = clock

    def take(self) -> list[tuple[Any, Any]]:
        """The (begin, end) marks since the last call."""
        taken, self._spans = self._spans, []
        return taken

    def __enter__(self) -> None:
        self._depth += 1
        if self._clock is not None and self._depth == 1:
            self._begin = self._clock.mark()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0 and self._begin is not None:
            assert self._clock is not None
            self._spans.append((self._begin, self._clock.mark()))
            self._begin = None

    def watch(self, model: nn.Module) -> None:
        """Count the gathers and reductions of a sharded model."""
        states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]  # type: ignore[attr-defined]
        for group in dict.fromkeys(group for state in states for group in state._fsdp_param_groups):
            mesh = group.mesh_info
            shards = mesh.shard_mesh_size if isinstance(mesh, FSDPMeshInfo) else 1
            for name in (*(GATHERS if shards > 1 else ()), *(REDUCES if mesh.mesh.size() > 1 else ())):
                setattr(group, name, self._around(getattr(group, name)))

    def _around(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self:
                return method(*args, **kwargs)

        return timed
