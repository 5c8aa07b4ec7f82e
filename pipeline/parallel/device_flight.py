"""Exchanges of rows that start before the host knows how many: the rows that are there travel, in buffers of fixed size.

The way there and back of a layer's rows, as `launch` and `land` of flight.py, each in both directions of autograd. The number of rows
for each rank is read on the device, by torch's all-to-all in symmetric memory (symmetric.py), on a stream of its own: landing makes
the stream that computes wait, never the host. What is sent is written where the peers fetch it by the kernel that makes it, and what arrives is
read there. Rows at experts are kept for backward, so they are copied out as well, on the exchange's stream, while the experts compute.

Buffers are shared by all layers. Where T trips are under way at once, one, or two with halves of a micro-batch in turns
(pipeline/model/interleave.py), T + 1 take turns for sending: one that is written may be in nobody's hands once the exchange after the one
that sent it has ended here, and that is one that computation has waited for already. T take turns for arriving: an exchange starts behind all that
computes, hence behind the last reading of what arrived T exchanges ago. On all ranks exchanges have one order, that of the program.

All-to-alls do not ask whether rows fit. So every rank sees all ranks' counts first, of rows and of pairs with experts, by a gathering
of W x 2 numbers behind which rows are copied; if some rank would send or get more than there is room for, nobody sends anything, and
every token's result, and its gradient, is NaN: the last row of what arrives is, and all are read from there. What was in a buffer before is
not read then either: two passes of the same step have the same bits (pipeline/training/recompute.py compares them).

Legend: N tokens here, W ranks, R rows that a rank has room for, S of them sent, e experts of a rank, D width.
"""

from __future__ import annotations

import math
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.model.devices import is_gpu
from pipeline.parallel import symmetric
from pipeline.parallel.dispatch import ABSENT, Choices, Ends, Plan, experts_of
from pipeline.parallel.exposed import Exposed
from pipeline.parallel.rows import Filled, bag_sums, gather_into


class Parcel(NamedTuple):
    """What an exchange carries for each row."""

    rows: int  # that there is room for
    width: int
    dtype: torch.dtype
    what: str = "rows"  # two of one shape that travel together have buffers of their own

    def lines(self, ranks: int) -> tuple[int, int]:
        """Rows of a buffer, one of them for NaN, and their width."""
        width = symmetric.padded(self.width, self.dtype, ranks)
        return max(self.rows + 1, -(-symmetric.AT_LEAST // (width * self.dtype.itemsize))), width

    def buffer_bytes(self, ranks: int, trips: int) -> int:
        """Of all buffers for it."""
        return (2 * trips + 1) * math.prod(self.lines(ranks)) * self.dtype.itemsize


class Leg(NamedTuple):
    """An exchange under way."""

    arriving: tuple[Tensor, ...]
    splits_W: Tensor  # must be there until the exchange has ended
    end: Any  # event


class Wire:
    """Buffers and stream of the exchanges of one group; `trips` are under way at once."""

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, exposed: Exposed | None = None, trips: int = 1
    ) -> None:
        self.trips = trips
        self.group, self.device, self.exposed = group, device, exposed or Exposed()
        self.ranks, self.rank = group.size(), group.rank()
        self._streams: Any = torch.get_device_module(device) if is_gpu(device) else None
        self._stream: Any = self._streams.Stream(device, priority=-1) if self._streams else None
        self._sending: dict[Parcel, list[Tensor]] = {}
        self._arriving: dict[Parcel, list[Tensor]] = {}
        self._splits_W: Tensor | None = None
        self._pads: list[Tensor] = []
        self._every: dict[int, Tensor] = {}
        self.exchanges = self._calls = 0
        self._ends: deque[Any] = deque(maxlen=trips)

    def room(self, parcel: Parcel) -> Tensor:
        """Where to write what the next exchange sends: [rows, width]. It has to be launched before another one."""
        if parcel not in self._sending:
            self._sending[parcel] = [self._buffer(parcel, f"sent {turn}") for turn in range(self.trips + 1)]
            self._arriving[parcel] = [self._buffer(parcel, f"arriving {turn}") for turn in range(self.trips)]
            for buffer in self._arriving[parcel]:
                buffer[parcel.rows].fill_(math.nan)
        if len(self._ends) == self.trips:
            self.wait(self._ends[0])
        return self._sending[parcel][self.exchanges % (self.trips + 1)][: parcel.rows, : parcel.width]

    def launch(self, splits_W: Tensor, parcels: tuple[Parcel, ...]) -> Leg:
        """Send `splits_W` rows of each parcel. What arrives has one row more than room, of NaN, and is to be read before as many
        exchanges are launched as trips are under way."""
        sent = [self._sending[parcel][self.exchanges % (self.trips + 1)] for parcel in parcels]
        arriving = [self._arriving[parcel][self.exchanges % self.trips] for parcel in parcels]
        if self._splits_W is None:
            numbers = self.ranks, torch.int64, self.device, self.group
            self._splits_W = symmetric.empty("splits", 1, *numbers)[0]
            self._pads = [symmetric.empty(f"pad {turn}", 2, *numbers) for turn in range(2)]
        if self._streams:
            self._stream.wait_stream(self._streams.current_stream())
        with self.aside():
            self._splits_W.copy_(splits_W)
            for source, buffer in zip(sent, arriving):
                symmetric.all_to_all(source, buffer, self._splits_W, self._pads[self._calls % 2], self.group)
                self._calls += 1
        self.exchanges += 1
        end = self.mark()
        self._ends.append(end)
        views = tuple(buffer[: parcel.rows + 1, : parcel.width] for buffer, parcel in zip(arriving, parcels))
        return Leg(views, splits_W, end)

    def land(self, leg: Leg) -> tuple[Tensor, ...]:
        """What has arrived, for the stream that computes."""
        with self.exposed:
            self.wait(leg.end)
        return leg.arriving

    def mark(self) -> Any:
        """An event: as far as the exchanges' stream is now."""
        return self._stream.record_event() if self._streams else None

    def wait(self, event: Any) -> None:
        """The stream that computes goes on when the event has come."""
        if event is not None:
            self._streams.current_stream().wait_event(event)

    def every(self, rows: int) -> Tensor:
        """0, 1, ..., rows - 1; to be asked for by the stream that computes, as it may be made then."""
        if rows not in self._every:
            self._every[rows] = torch.arange(rows, device=self.device)
        return self._every[rows]

    def _buffer(self, parcel: Parcel, turn: str) -> Tensor:
        name = f"{parcel.rows} {parcel.what} of {parcel.width}, {turn}"  # sizes are rounded up, and the row of NaN is behind these
        return symmetric.empty(name, *parcel.lines(self.ranks), parcel.dtype, self.device, self.group)

    def aside(self) -> AbstractContextManager[Any]:
        """What is computed inside comes behind the exchanges that were launched, and before the next. Nothing may be made inside: the
        stream that computes knows of exchanges and marks alone."""
        return self._streams.stream(self._stream) if self._streams else nullcontext()


class Trip:
    """How many rows of a layer go where, and its exchange that is under way. Nothing in it is as large as the rows."""

    def __init__(self, wire: Wire, counts_W2: Tensor, rows: Parcel, weights: Parcel, pairs: int) -> None:
        self.wire, self.rows, self.weights, self.pairs = wire, rows, weights, pairs
        leaving = counts_W2[:, 0].sum(0, keepdim=True).clamp(max=rows.rows)
        self.left = Filled(leaving, rows.rows)  # what is written to be sent
        self.counts_WW2 = counts_W2.new_empty(wire.ranks**2, 2)
        self._work: Any = dist.all_gather_single(self.counts_WW2, counts_W2, group=wire.group, async_op=True)
        self.leg: Leg | None = None
        self._written: int | None = None  # the exchange that will send what was written
        self.kept_RD: Tensor | None = None  # rows that arrive, copied out
        self._copied: Any = None  # event: they are

    def decide(self) -> Tensor:
        """Once all counts are there: whether they are too many, on all ranks alike."""
        wire, room = self.wire, self.rows.rows
        with wire.exposed:
            self._work.wait()
        rows_WW, pairs_WW = self.counts_WW2.view(wire.ranks, wire.ranks, 2).unbind(-1)
        most_rows = torch.maximum(rows_WW.sum(0), rows_WW.sum(1)).max()  # that a rank gets, or sends
        too_many = (most_rows > room) | (pairs_WW.sum(0).max() > self.pairs)
        self.sent_W = rows_WW[wire.rank].masked_fill(too_many, 0)
        self.received_W = rows_WW[:, wire.rank].masked_fill(too_many, 0)
        self.arrived = Filled(self.received_W.sum(0, keepdim=True), room)
        self.left = Filled(self.left.counts_B.masked_fill(too_many, 0), room)  # and nothing comes back
        del self._work, self.counts_WW2
        return too_many

    def room(self) -> Tensor:
        """Where experts may write what is sent next. From then on the rows that arrived are where backward finds them."""
        self.wire.wait(self._copied)
        self._written, self._copied = self.wire.exchanges, None
        return self.wire.room(self.rows)

    def write(self, rows_RD: Tensor) -> None:
        """What is sent next, unless it was written there."""
        written, self._written = self._written, None
        if written is None:
            self.wire.wait(self._copied)
            room_RD, every_R = self.wire.room(self.rows), self.wire.every(self.rows.rows)
            gather_into(room_RD, rows_RD.contiguous(), every_R, self.arrived)
        else:
            assert written == self.wire.exchanges, (
                "another exchange was launched between the writing of rows and their own"
            )

    def launch(self, splits_W: Tensor, *parcels: Parcel) -> None:
        self.leg = self.wire.launch(splits_W, parcels)

    def keep(self, x_RD: Tensor) -> None:
        """Send rows and weights to experts; what arrives is copied to `x_RD`, behind the exchange and before the next one's end."""
        every_R = self.wire.every(self.rows.rows)
        self.launch(self.sent_W, self.weights, self.rows)
        assert self.leg is not None
        with self.wire.aside():
            gather_into(x_RD, self.leg.arriving[1][: self.rows.rows], every_R, self.arrived)
        self.kept_RD, self._copied = x_RD, self.wire.mark()

    def land(self) -> tuple[Tensor, ...]:
        assert self.leg is not None
        leg, self.leg = self.leg, None
        return self.wire.land(leg)

    def there_S1(self, filled: Filled) -> Tensor:
        """Which rows of the room there are."""
        return (self.wire.every(filled.slots) < filled.counts_B).unsqueeze(1)


class DeviceJourney:
    """See `Journey` (dispatch.py). `pairs`: of a row and an expert, that a rank has room for."""

    def __init__(self, x_ND: Tensor, plan: Plan, pairs: int, wire: Wire) -> None:
        self.placing, rooms = plan.placing, plan.placing.row_M.shape[0]
        weights_Re = plan.weights_LE.index_select(0, plan.placing.choice_M)
        rows = Parcel(rooms, x_ND.shape[1], x_ND.dtype)
        weights = Parcel(rooms, weights_Re.shape[1], weights_Re.dtype, "weights")
        self.trip = Trip(wire, plan.counts_W2, rows, weights, pairs)
        self.ticket, self.places_M = cast(
            tuple[Tensor, Tensor],
            _Depart.apply(self.trip, x_ND, weights_Re, self.placing.row_M, self.placing.place_M, self.placing.bags_R1),
        )

    def arrive(self) -> tuple[Tensor, Choices]:
        trip = self.trip
        weights_Re, x_RD, arrived_RD = cast(tuple[Tensor, Tensor, Tensor], _Arrive.apply(trip, self.ticket))
        ends = Ends(arrived_RD, trip.room)
        return x_RD, Choices(experts_of(weights_Re), weights_Re, trip.pairs, all_chosen=False, bounded=True, ends=ends)

    def send_back(self, y_RD: Tensor) -> None:
        self.ticket = cast(Tensor, _Return.apply(self.trip, y_RD))

    def come_home(self) -> Tensor:
        placing = self.placing
        return cast(Tensor, _Home.apply(self.trip, self.ticket, placing.row_M, self.places_M, placing.bags_R1))


def _ticket(x: Tensor) -> Tensor:
    """Stands in autograd for what is under way."""
    return x.new_empty(0)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, trip: Trip, x_ND: Tensor, weights_Re: Tensor, row_M: Tensor, place_M: Tensor, bags_R1: Tensor
    ) -> tuple[Tensor, Tensor]:
        trip.wire.room(trip.weights).copy_(weights_Re)
        gather_into(trip.wire.room(trip.rows), x_ND.contiguous(), row_M, trip.left)
        too_many = trip.decide()
        places_M = place_M.masked_fill(too_many, trip.rows.rows)  # the row of NaN
        trip.keep(x_ND.new_empty(trip.rows.rows, x_ND.shape[1]))
        ctx.trip = trip
        ctx.save_for_backward(places_M, bags_R1)
        ctx.mark_non_differentiable(places_M)
        return _ticket(x_ND), places_M

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, Tensor, Tensor, None, None, None]:
        trip: Trip = ctx.trip
        grad_weights_Re, grad_RD = trip.land()
        grad_weights_Re = grad_weights_Re[: trip.rows.rows].where(trip.there_S1(trip.left), 0.0)
        return None, bag_sums(grad_RD, *ctx.saved_tensors), grad_weights_Re, None, None, None


class _Arrive(torch.autograd.Function):
    """The rows come twice: as backward will find them, and where they arrived."""

    @staticmethod
    def forward(ctx: Any, trip: Trip, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.trip = trip
        weights_Re, arrived_RD = (arrived[: trip.rows.rows] for arrived in trip.land())
        x_RD, trip.kept_RD = trip.kept_RD, None
        assert x_RD is not None
        arrived_RD = arrived_RD.detach()
        ctx.mark_non_differentiable(arrived_RD)
        return weights_Re.where(trip.there_S1(trip.arrived), ABSENT), x_RD, arrived_RD

    @staticmethod
    def backward(ctx: Any, grad_weights_Re: Tensor, grad_RD: Tensor, _: Tensor) -> tuple[None, Tensor]:
        trip: Trip = ctx.trip
        trip.wire.room(trip.weights).copy_(grad_weights_Re)
        trip.write(grad_RD)
        trip.launch(trip.received_W, trip.weights, trip.rows)
        return None, _ticket(grad_RD)


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trip: Trip, y_RD: Tensor) -> Tensor:
        ctx.trip = trip
        trip.write(y_RD)
        trip.launch(trip.received_W, trip.rows)
        return _ticket(y_RD)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, Tensor]:
        trip: Trip = ctx.trip
        (grad_RD,) = trip.land()
        return None, grad_RD[: trip.rows.rows]


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trip: Trip, _: Tensor, row_M: Tensor, places_M: Tensor, bags_R1: Tensor) -> Tensor:
        ctx.trip = trip
        ctx.save_for_backward(row_M)
        (y_RD,) = trip.land()
        return bag_sums(y_RD, places_M, bags_R1)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[None, Tensor, None, None, None]:
        trip: Trip = ctx.trip
        (row_M,) = ctx.saved_tensors
        gather_into(trip.wire.room(trip.rows), grad_ND.contiguous(), row_M, trip.left)
        trip.launch(trip.sent_W, trip.rows)
        return None, _ticket(grad_ND), None, None, None
