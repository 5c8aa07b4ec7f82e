"""Rows that travel by splits read on the device give the bits of those that the host counted first."""

import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from pipeline.config.training import TrainingConfig
from pipeline.parallel import symmetric
from pipeline.parallel.bounded import BoundedDispatch
from pipeline.parallel.device_flight import Parcel, Wire
from pipeline.parallel.exposed import Exposed
from pipeline.parallel.shard import _dispatcher
from pipeline.parallel.wire_check import ROUNDS, fault
from tests.distributed import run_distributed
from tests.parallel.symmetric_gloo import symmetric_over_gloo
from tests.parallel.test_dispatch import SKEWED, run_case

EVEN = [0.0] * 8
CASES = {  # bias, tokens of each rank, capacity
    2: [
        (EVEN, [6, 6], 2.0),
        (SKEWED, [5, 5], 4.0),
        (EVEN, [0, 0], 1.0),
        (EVEN, [40, 40], 1.5),
        ([0.0] * 128, [6, 6], 4.0),  # as many experts on a rank as a row is wide
    ],
    4: [(SKEWED, [6, 6, 6, 6], 8.0), (EVEN, [7, 7, 7, 7], 2.0)],  # ranks 2 and 3 hold experts that nobody chose
}


def both_ways(world: int) -> list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """On one wire, one after the other, as layers use it; the last without room for what SKEWED asks of rank 0, then one with."""
    with symmetric_over_gloo() as found:
        wire = Wire(dist.group.WORLD, torch.device("cpu"))
        results = [(run_case(*case, wire), run_case(*case[:2])) for case in CASES[world]]
        assert found.calls == 6 * len(CASES[world])  # rows four times, weights there and their gradients back
        sent = found.bytes_sent
        results.append((run_case(SKEWED, [6] * world, 1.0, wire), {}))
        assert found.bytes_sent == sent
        results.append((run_case(*CASES[world][0], wire), results[0][1]))
    return results


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.long)])
def test_the_bits_of_buffers_that_fit_or_no_number(world: int) -> None:
    """Too many rows are no number on any rank; nothing is sent then, and the exchange after it is as if nothing had been."""
    for results in run_distributed(both_ways, world, world):
        (overflowed, _), (after, expected) = results[-2:]
        assert overflowed["out"].isnan().all()
        assert overflowed["x"].isnan().all()
        assert not overflowed["router"].any()  # nothing is left in it of what arrived before
        for ours, fitting in (*results[:-2], (after, expected)):
            for name, tensor in fitting.items():
                assert torch.equal(ours[name], tensor), name


def test_more_bytes_than_blocks_fetch_alike_are_refused() -> None:
    """64 blocks fetch rows from all ranks, in equal parts of whole bytes."""
    assert [symmetric.divides(ranks, 4096) for ranks in (1, 2, 8, 64, 3, 6, 128)] == [True] * 4 + [False] * 3
    assert symmetric.divides(8, 8)
    assert not symmetric.divides(2, 48)
    assert [symmetric.padded(width, torch.float32, 2) for width in (1, 8, 9)] == [8, 8, 16]
    for ranks, width in ((2, 5), (8, 8), (64, 1)):
        assert symmetric.divides(ranks, symmetric.padded(width, torch.float32, ranks) * 4)
        lines, padded = Parcel(10, width, torch.float32).lines(ranks)
        assert lines * padded * 4 >= symmetric.AT_LEAST


def test_what_cannot_be_is_refused_by_name_or_left() -> None:
    def group(ranks: int) -> Any:
        return SimpleNamespace(size=lambda: ranks)

    meshes: Any = SimpleNamespace(ep=SimpleNamespace(get_group=lambda: group(2)), exposed=Exposed())
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    forced = TrainingConfig(expert_capacity=1.25, expert_splits="device")
    with pytest.raises(
        ValueError, match=r"training\.expert_splits device: rows on a CPU travel by gloo; use auto, or equal"
    ):
        _dispatcher(forced, meshes, cpu, 4096)
    left = _dispatcher(forced.model_copy(update={"expert_splits": "auto"}), meshes, cpu, 4096)
    assert isinstance(left, BoundedDispatch)
    assert left.wire is None
    assert "two ranks" in str(symmetric.missing(cuda, group(1), 4096))
    assert "not ep 6 and 4096 bytes" in str(symmetric.missing(cuda, group(6), 4096))
    assert symmetric.missing(torch.device("meta"), group(8), 4096) is None  # as a rehearsal's stand-in


def faults(world: int, trips: int) -> list[str | None]:
    """Of the operator as it is read, of one that takes rows from another place, one that fetches too late, and one that does not begin."""
    with symmetric_over_gloo() as found:
        sound = fault(Wire(dist.group.WORLD, torch.device("cpu"), trips=trips), 64)
        assert found.calls == ROUNDS
        operator = symmetric.all_to_all

        def turned(sent: Any, arriving: Any, splits_W: Any, *others: Any) -> None:
            operator(sent.roll(1, 0), arriving, splits_W, *others)

        def late(sent: Any, *others: Any) -> None:
            if dist.get_rank() == 1:  # its rows are those of the exchange before
                sent, before[:] = before[0] if before else sent, [sent.clone()]
            operator(sent, *others)

        def refused(*_: Any) -> None:
            raise RuntimeError("no team\nof these ranks")

        before: list[Any] = []
        results = [sound]
        for broken in (turned, late, refused):
            aside = mock.patch.object(Wire, "aside", return_value=nullcontext())  # these make tensors there
            with aside, mock.patch.object(symmetric, "all_to_all", broken):
                results.append(fault(Wire(dist.group.WORLD, torch.device("cpu"), trips=trips), 64))
    return results


@pytest.mark.parametrize("trips", [1, 2])
def test_an_exchange_that_is_not_as_it_was_read_is_found_before_a_run_trusts_it(trips: int) -> None:
    for sound, turned, late, refused in run_distributed(faults, 2, 2, trips):
        assert sound is None
        assert refused == "NVSHMEM exchanges nothing between these ranks: no team"
        assert turned == f"rows arrived wrong at 2 of 2 ranks, in exchange 1 of {ROUNDS} that were tried"
        assert late == f"rows arrived wrong at 2 of 2 ranks, in exchange 2 of {ROUNDS} that were tried"


def test_memory_that_ranks_free_together_is_freed_by_none_and_taken_again_by_name() -> None:
    """Python lets go of tensors at another moment on each rank, and on one that fails alone."""
    group: Any = SimpleNamespace(group_name="experts", size=lambda: 2, rank=lambda: 0)
    asked = "rows", 2, 8, torch.float32, torch.device("cpu"), group
    with (
        mock.patch.dict(symmetric._kept, clear=True),
        mock.patch.object(symmetric.symm_mem, "empty", lambda *size, **kind: torch.empty(size, **kind)),
        mock.patch.object(symmetric.symm_mem, "rendezvous") as met,
    ):
        first = symmetric.empty(*asked)
        assert symmetric.empty("others", *asked[1:]).data_ptr() != first.data_ptr()
        there, was = weakref.ref(first), first.data_ptr()
        del first
        assert symmetric.empty(*asked).data_ptr() == was
        assert met.call_count == 3  # a network that is built again has a group of its own
        wire = Wire(group, torch.device("cpu"))  # of few rows, all buffers are of one size
        rooms = [wire.room(Parcel(rows, 8, torch.float32, what)) for rows in (2, 3) for what in ("rows", "weights")]
        assert len({room.data_ptr() for room in rooms}) == len(rooms)
        symmetric._kept.clear()  # as at the end of the interpreter
        assert there() is not None
