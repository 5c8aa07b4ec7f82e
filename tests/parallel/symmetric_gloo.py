"""Stands in for symmetric memory and its all-to-all on gloo ranks: what pipeline/parallel/symmetric.py says of torch's operator, at its
most inconvenient.

Rows are fetched as late as the operator may: when somebody waits for them, or at the next call. Until then a peer may still be fetching, so
what is sent has to be as it was at the next call, whose pad has to be another one: nobody would see it else, as here all fetch at one time. Where nothing
arrives there is NaN afterwards, and more rows than there is room for are an error; the operator itself would write behind the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from pipeline.parallel import device_flight, symmetric
from pipeline.parallel.device_flight import Wire


@dataclass
class Wires:
    """What was asked of the stand-in."""

    calls: int = 0
    bytes_sent: int = 0  # that left this rank
    buffers: list[Tensor] = field(default_factory=list)


class MakesNothing(TorchDispatchMode):
    """Aside of the stream that computes nothing is made: that stream waits for the exchange before it, and would read it too early."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, found = (
            {x.untyped_storage().data_ptr() for x in tree_leaves(tree) if isinstance(x, Tensor)}
            for tree in ((args, kwargs), out)
        )
        assert found <= given, f"{func} makes a tensor aside"
        return out


@contextmanager
def symmetric_over_gloo() -> Iterator[Wires]:
    """Networks that are sharded inside take splits from the device where `training.expert_splits` lets them."""
    found, under_way, last = Wires(), list[Any](), list[Any]()

    def untouched() -> None:
        if last:
            sent, as_it_was, _ = last.pop()
            assert torch.equal(sent[: len(as_it_was)].view(torch.uint8), as_it_was.view(torch.uint8)), (
                "written while a peer may read it"
            )

    def call(sent: Tensor, arriving: Tensor, splits_W: Tensor, pad_2W: Tensor, group_name: str) -> None:
        fetch()
        assert not last or last[0][2].data_ptr() != pad_2W.data_ptr()
        untouched()
        group = _resolve_process_group(group_name)
        received_W = torch.empty_like(splits_W)
        dist.all_to_all_single(received_W, splits_W, group=group)
        assert splits_W.min() >= 0
        assert sent.shape[0] > splits_W.sum(), "more is sent than there is"
        assert arriving.shape[0] > received_W.sum(), "more arrives than there is room for"
        assert sent.nbytes >= symmetric.AT_LEAST
        assert sent.stride() == arriving.stride()
        assert sent.stride(0) * sent.element_size() % (symmetric.BLOCKS // group.size()) == 0
        pad_2W.copy_(torch.stack([received_W, received_W.cumsum(0) - received_W]))
        found.calls += 1
        leaving = int(splits_W.sum() - splits_W[group.rank()])
        found.bytes_sent += leaving * sent[0].nbytes
        last.append((sent, sent[: int(splits_W.sum())].clone(), pad_2W))
        under_way.append((sent, arriving, splits_W.tolist(), received_W.tolist(), group))

    def fetch() -> None:
        if under_way:
            sent, arriving, sent_W, received_W, group = under_way.pop()
            rows = arriving.new_empty(sum(received_W), *arriving.shape[1:])
            dist.all_to_all_single(rows, sent[: sum(sent_W)], received_W, sent_W, group=group)
            arriving[: len(rows)] = rows
            arriving[len(rows) :] = math.nan

    def empty(
        name: str, rows: int, width: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup
    ) -> Tensor:
        found.buffers.append(torch.full((rows, width), math.nan if dtype.is_floating_point else -1, dtype=dtype))
        return found.buffers[-1]

    land, gather = Wire.land, device_flight.gather_into

    def fetched_first(into: Tensor, x: Tensor, *arguments: Any) -> None:
        if under_way and x.untyped_storage().data_ptr() == under_way[0][1].untyped_storage().data_ptr():
            with _disable_current_modes():
                fetch()
        gather(into, x, *arguments)

    library = torch.library.Library("symm_mem", "IMPL")
    library.impl("all_to_all_vdev", call, "CPU")
    with (
        mock.patch.object(symmetric, "empty", empty),
        mock.patch.object(symmetric, "missing", return_value=None),
        mock.patch.object(Wire, "aside", side_effect=MakesNothing),
        mock.patch.object(Wire, "land", lambda wire, leg: (fetch(), land(wire, leg))[1]),
        mock.patch.object(device_flight, "gather_into", fetched_first),
    ):
        try:
            yield found
        finally:
            library._destroy()
