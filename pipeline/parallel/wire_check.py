"""Before a run trusts its rows to an exchange: some whose contents everybody knows travel by it, on the ranks that will use it.

What symmetric.py says of torch's operator was read, not seen, and a fault of it would be silent: a row of another token, or of an
exchange before. So exchanges follow one another as a step's do, as many under way at once, written where the last ones were sent from,
and every number that arrives is compared on the device. It costs some milliseconds at the start of a run, and 4 MB a buffer for good (symmetric.py says why).

Legend: W ranks, R exchanges.
"""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.parallel import symmetric
from pipeline.parallel.device_flight import Leg, Parcel, Wire

ROUNDS = 12  # exchanges
ROWS = 96  # that a rank has room for


def fault(wire: Wire, row_bytes: int) -> str | None:
    """What is wrong with rows that arrived by `wire`, or None. A collective call of all ranks of the run, with one answer."""
    device, me, ranks = wire.device, wire.rank, wire.ranks
    parcel = Parcel(ROWS, row_bytes // 4, torch.float32)

    def rows(number: int, sender: int, receiver: int) -> Tensor:
        return _rows(number, sender, receiver, ranks, device).expand(-1, parcel.width)

    leaving = [[rows(number, me, other) for other in range(ranks)] for number in range(ROUNDS)]
    expected = [torch.cat([rows(number, other, me) for other in range(ranks)]) for number in range(ROUNDS)]
    splits_RW = torch.tensor([[len(each) for each in all_] for all_ in leaving], device=device)
    wrong = torch.zeros(ROUNDS, dtype=torch.int64, device=device)
    under_way = deque[Leg]()

    def compare(number: int) -> None:
        (arrived,) = wire.land(under_way.popleft())
        wrong[number] = (arrived[: len(expected[number])] != expected[number]).any()

    refused = None
    try:
        for number, sent in enumerate(leaving):  # from here on the host waits for nothing
            wire.room(parcel)[: sum(map(len, sent))].copy_(torch.cat(sent))
            under_way.append(wire.launch(splits_RW[number], (parcel,)))
            if number + 1 >= wire.trips:
                compare(number + 1 - wire.trips)
        for number in range(ROUNDS - len(under_way), ROUNDS):
            compare(number)
    except RuntimeError as error:  # teams of ranks are made at the first exchange
        refused = f"NVSHMEM exchanges nothing between these ranks: {str(error).splitlines()[0]}"
    if refused := symmetric.agreed(refused, device):
        return refused
    dist.all_reduce(wrong)
    found = wrong.tolist()
    if not any(found):
        return None
    first = next(number for number, at in enumerate(found) if at)
    return f"rows arrived wrong at {found[first]} of {dist.get_world_size()} ranks, in exchange {first + 1} of {ROUNDS} that were tried"


def _rows(number: int, sender: int, receiver: int, ranks: int, device: torch.device) -> Tensor:
    """What one rank sends another in an exchange: from none to ROWS / W whole numbers below 2^24, no two of the run alike. [rows, 1]"""
    most = ROWS // ranks
    first = ((number * ranks + sender) * ranks + receiver) * most
    return (
        torch.arange(first, first + (7 * number + 5 * sender + 3 * receiver) % (most + 1), device=device)
        .float()
        .unsqueeze(1)
    )
