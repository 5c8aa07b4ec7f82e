"""What is done to a rank before it begins. Each function is given its settings and, last, the rank; `partial` binds the former."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

import torch

from pipeline.storage import Storage
from pipeline.training import checkpoint, trainer
from pipeline.training.checkpoint import Checkpointer
from pipeline.training.files import CheckpointWriter
from pipeline.training.metrics import MetricsFiles
from pipeline.training.retention import Retention
from pipeline.training.step import Step

SAVE = 2  # the save that is hurt; the one before it is whole


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def around(
    owner: Any, name: str, at: int, before: Callable[..., object] | None, after: Callable[..., object] | None
) -> None:
    """Do something before or after the `at`-th call of a function."""
    original, calls = getattr(owner, name), []

    def hurt(*args: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == at and before is not None:
            before(*args)
        result = original(*args, **options)
        if len(calls) == at and after is not None:
            after(*args)
        return result

    setattr(owner, name, hurt)


class Hurt:
    """A stream of which the second write goes wrong."""

    def __init__(self, stream: IO[bytes], harm: Callable[[], object]) -> None:
        self._stream, self._harm, self._writes = stream, harm, 0

    def write(self, data: Any) -> int:
        self._writes += 1
        if self._writes == 2:
            self._stream.flush()
            self._harm()
        return self._stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def in_part(harm: Callable[[], object]) -> None:
    """Harm in the middle of this rank's part of save number SAVE."""
    original, saves = Storage.stream, []

    @contextlib.contextmanager
    def hurt(self: Storage, path: str) -> Iterator[Any]:
        with original(self, path) as stream:
            if path.endswith(".distcp"):
                saves.append(None)
            yield Hurt(stream, harm) if path.endswith(".distcp") and len(saves) == SAVE else stream

    Storage.stream = hurt  # type: ignore[method-assign, assignment]


def half_deleted() -> None:
    """Dies when the first checkpoint that retention deletes has lost its manifest and has its parts."""
    original = Retention._delete

    def hurt(self: Retention, step: int) -> None:
        around(Storage, "delete", 1, None, die)
        original(self, step)

    Retention._delete = hurt  # type: ignore[method-assign]


# moment: (rank, what is done to it)
MOMENTS: dict[str, tuple[int, Callable[[], None]]] = {
    "before its metrics are written": (0, lambda: around(MetricsFiles, "write", SAVE, die, None)),
    "when its metrics are written": (0, lambda: around(MetricsFiles, "write", SAVE, None, die)),
    "before the state is copied": (1, lambda: around(Checkpointer, "_stage", SAVE, die, None)),
    "when the state is copied": (1, lambda: around(Checkpointer, "_stage", SAVE, None, die)),
    "when run.json is written": (0, lambda: around(Checkpointer, "_begin", SAVE, None, die)),
    "in the first rank's part": (0, lambda: in_part(die)),
    "in the last rank's part": (1, lambda: in_part(die)),
    "before .metadata is written": (0, lambda: around(CheckpointWriter, "finish", SAVE, die, None)),
    "when .metadata is written": (0, lambda: around(CheckpointWriter, "finish", SAVE, None, die)),
    "right before the manifest": (0, lambda: around(checkpoint, "commit", SAVE, die, None)),
    "right after the manifest": (0, lambda: around(checkpoint, "commit", SAVE, None, die)),
    "when an old checkpoint is half deleted": (0, half_deleted),
}


def killed_in_save(moment: str, rank: int) -> None:
    guilty, strike = MOMENTS[moment]
    if rank == guilty:
        strike()


def disk_full(rank: int) -> None:
    """The last rank's part meets a full disk, as the kernel says it: /dev/full."""

    def full() -> None:
        with open("/dev/full", "wb", buffering=0) as device:
            device.write(b"x")

    if rank == 1:
        in_part(full)


def failing_writes(number: int, rank: int) -> None:
    """From the second save on nothing can be written."""
    saves: list[None] = []
    place, stream = Storage._place, Storage.stream

    def refuse(path: str) -> None:
        if (path.endswith(".distcp") and not saves) or (path.endswith("run.json") and saves):
            saves.append(None)
        if len(saves) > 1:
            raise OSError(number, os.strerror(number), path)

    def placing(self: Storage, path: str, fill: Any, put: Any) -> None:
        refuse(path)
        place(self, path, fill, put)

    @contextlib.contextmanager
    def streaming(self: Storage, path: str) -> Iterator[Any]:
        refuse(path)
        with stream(self, path) as file:
            yield file

    Storage._place, Storage.stream = placing, streaming  # type: ignore[method-assign, assignment]


def slow_writes(seconds: float, rank: int) -> None:
    """Every object that is written takes that much longer."""
    place = Storage._place

    def placing(self: Storage, path: str, fill: Any, put: Any) -> None:
        time.sleep(seconds)
        place(self, path, fill, put)

    Storage._place = placing  # type: ignore[method-assign]


def io_error(rank: int) -> None:
    failing_writes(errno.EIO, rank)


def bad_loss(value: float, first: int, last: int, guilty: int, rank: int) -> None:
    """One rank's loss, and its gradients, are this much in steps `first` to `last`."""
    backward, calls = Step.forward_backward, []

    def hurt(self: Step, *arguments: Any) -> Any:
        loss, aux_loss = backward(self, *arguments)
        calls.append(None)
        if rank == guilty and first <= len(calls) <= last:
            loss = loss + value
            if not torch.isfinite(loss):
                for parameter in self.parameters:
                    if parameter.grad is not None:
                        parameter.grad.mul_(float("nan"))
        return loss, aux_loss

    Step.forward_backward = hurt  # type: ignore[method-assign]


def bad_data(position: int, value: float, rank: int) -> None:
    """The loss of a step that begins at this position of the data is so much higher, whoever trains it and whenever."""
    reading, backward, at = trainer.read_step, Step.forward_backward, []

    def read(loader: Any, first: int, *arguments: Any) -> Any:
        at.append(int(loader.order.positions(first)))
        return reading(loader, first, *arguments)

    def hurt(self: Step, *arguments: Any) -> Any:
        loss, aux_loss = backward(self, *arguments)
        return loss + (value if at[-1] == position else 0.0), aux_loss

    trainer.read_step = read
    Step.forward_backward = hurt  # type: ignore[method-assign]


def killed_when_it_goes_back(rank: int) -> None:
    """All is decided and nothing is undone."""
    if rank == 0:
        around(trainer, "decide", 1, None, die)


def hangs(step: int, rank: int) -> None:
    """The last rank is stopped in that step, as by a debugger or a dead NFS server."""
    if rank == 1:
        around(Step, "forward_backward", step, lambda *_: os.kill(os.getpid(), signal.SIGSTOP), None)


def slow_steps(seconds: float, rank: int) -> None:
    backward = Step.forward_backward

    def slow(self: Step, *arguments: Any) -> Any:
        time.sleep(seconds)
        return backward(self, *arguments)

    Step.forward_backward = slow  # type: ignore[method-assign]


def clock_back(step: int, seconds: float, rank: int) -> None:
    """From that step on this process's wall clock is that much behind; step 0: from the beginning."""
    real = time.time

    def set_back(*_: object) -> None:
        time.time = lambda: real() - seconds

    if step:
        around(Step, "forward_backward", step, set_back, None)
    else:
        set_back()


def both(first: Callable[[int], None], second: Callable[[int], None], rank: int) -> None:
    first(rank)
    second(rank)
