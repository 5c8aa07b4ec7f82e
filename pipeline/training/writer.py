"""The right to write a run: rank 0 holds the lease of the run's training, and all ranks live by it.

    <root>/runs/<run_id>/train/writer.json      who trains this run, see pipeline/lease.py

The lease's number is in every checkpoint's manifest, and in the name of the folder that its parts are written to: a process that
was suspended, taken for dead and wakes can neither commit nor touch what its successor writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from pipeline.lease import Lease, hold, say_waiting
from pipeline.storage import Storage
from pipeline.training.commits import lease_path, step_folder, step_folders


class Writer:
    """What every rank knows of the lease; only rank 0 has it."""

    def __init__(self, number: int, lease: Lease | None) -> None:
        self.number = number
        self._lease = lease

    @property
    def lost(self) -> bool:
        """As far as rank 0 knows; costs nothing."""
        return self._lease is not None and self._lease.lost

    def check(self) -> None:
        """On rank 0: raises LeaseLost if somebody has taken over. Costs a read."""
        if self._lease is not None:
            self._lease.check()


@contextlib.contextmanager
def sole_writer(storage: Storage, run_id: str, owner: str | None = None) -> Iterator[Writer]:
    """Collective over the default process group. `owner`: as of `lease.hold`. Raises Held on every rank if somebody else trains."""
    if not dist.is_initialized():
        with _held(storage, run_id, owner) as own:
            yield Writer(own.number, own)
        return
    group = dist.new_group(backend="gloo")  # not the training's, whose backend may have no place for Python objects
    with contextlib.ExitStack() as stack:
        lease: Lease | None = None
        answer: int | Exception | None = None
        if dist.get_rank() == 0:
            try:
                lease = stack.enter_context(_held(storage, run_id, owner))
                answer = lease.number
            except Exception as error:  # of rank 0 alone: the others wait for its answer
                answer = error
        box = [answer]
        dist.broadcast_object_list(box, src=0, group=group)
        if isinstance(box[0], Exception):
            raise box[0]
        assert isinstance(box[0], int)
        yield Writer(box[0], lease)


def _held(storage: Storage, run_id: str, owner: str | None) -> contextlib.AbstractContextManager[Lease]:
    after = 0 if storage.exists(lease_path(run_id)) else _last_number(storage, run_id)
    return hold(
        storage,
        lease_path(run_id),
        what=f"run {run_id}",
        owner=owner,
        after=after,
        waiting=say_waiting,
    )


def _last_number(storage: Storage, run_id: str) -> int:
    """The largest number under which parts of checkpoints were written, whatever became of their manifests."""
    names = (name for step in step_folders(storage, run_id) for name in storage.names(step_folder(run_id, step)))
    return max((int(name[7:]) for name in names if name.startswith("writer-") and name[7:].isdecimal()), default=0)
