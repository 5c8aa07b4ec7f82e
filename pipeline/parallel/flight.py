"""An exchange of rows that does not block: launched, then awaited, in both directions of autograd.

`launch` starts an `all_to_all_single` of each tensor and returns what will have arrived once `land` was called; what is
computed between the two runs behind the exchange. Backward mirrors this: the gradient of `land` launches the exchange the
other way, the gradient of `launch` awaits it. Autograd runs nodes that are ready last made first, so what was computed
between the two in forward is differentiated between the two in backward, behind that exchange. On CUDA awaiting makes
the stream wait, never the host.

All tensors of a flight travel in the order given, on every rank, both ways. Nothing may touch what `launch` returned but
`land`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.parallel.exposed import Exposed


class Flight:
    """Splits of an exchange (first dim, by rank) and what of it is under way."""

    def __init__(
        self, sent_W: list[int], received_W: list[int], group: dist.ProcessGroup, exposed: Exposed | None = None
    ) -> None:
        self.sent_W, self.received_W, self.group = sent_W, received_W, group
        self.exposed = exposed or Exposed()
        self.works: list[Any] = []
        self.returning: list[Tensor | None] = []

    def start(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(self._start(x, self.sent_W, self.received_W) for x in tensors)

    def start_back(self, gradients: tuple[Tensor | None, ...]) -> None:
        self.returning = [
            None if grad is None else self._start(grad, self.received_W, self.sent_W) for grad in gradients
        ]

    def finish(self) -> None:
        with self.exposed:
            for work in self.works:
                work.wait()
        self.works = []

    def _start(self, x: Tensor, sent_W: list[int], received_W: list[int]) -> Tensor:
        arriving = x.new_empty(sum(received_W), *x.shape[1:])
        x = x.contiguous()
        self.works.append(dist.all_to_all_single(arriving, x, received_W, sent_W, group=self.group, async_op=True))
        return arriving


def launch(flight: Flight, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Start sending the rows of each tensor."""
    return cast(tuple[Tensor, ...], _Launch.apply(flight, *tensors))


def land(flight: Flight, *arriving: Tensor) -> tuple[Tensor, ...]:
    """What `launch` returned, arrived."""
    return cast(tuple[Tensor, ...], _Land.apply(flight, *arriving))


class _Launch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.flight = flight
        return flight.start(tensors)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        flight: Flight = ctx.flight
        flight.finish()
        arrived, flight.returning = flight.returning, []
        return (None, *arrived)


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, *arriving: Tensor) -> tuple[Tensor, ...]:
        ctx.flight = flight
        flight.finish()
        return arriving

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flight: Flight = ctx.flight
        wanted = tuple(grad if needed else None for grad, needed in zip(gradients, ctx.needs_input_grad[1:]))
        flight.start_back(wanted)
        return (None, *wanted)  # of the right shapes; `_Launch.backward` returns what arrives instead
