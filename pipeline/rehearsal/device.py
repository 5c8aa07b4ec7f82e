"""A GPU that is not there: a device named "gpu" whose tensors have shapes, dtypes and strides but no memory.

PyTorch gives one device type to whoever brings it (PrivateUse1) and lets Python stand for its driver. FSDP2, autograd
and process groups treat it as they treat CUDA: they ask `torch.gpu` for streams and events, which here are lines on the
tape, and their collectives go to a process group of ours that moves nothing.

Once a process, and a process has one such device: a rehearsal is a program of its own (`jobs.plan --rehearse`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from pipeline.rehearsal.tape import MAIN, Await, AwaitMark, Collective, HostWait, Mark, Tape

NAME = "gpu"
TAPE = Tape()  # of this process: torch asks the device module, not us, for streams


class Stream:
    """Has a name; what is launched under it is written down with it."""

    made = 0

    def __init__(self, device: Any = None, priority: int = 0, *, name: str | None = None, **_: Any) -> None:
        if name is None:
            Stream.made += 1
        self.name = name or f"stream {Stream.made}"

    def wait_event(self, event: Event) -> None:
        if event.number:
            TAPE.add(AwaitMark(self.name, event.number))

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        TAPE.add(HostWait("stream.synchronize", self.name, TAPE.phase, TAPE.caller()))


class Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.number = 0
        self.stream = MAIN

    def record(self, stream: Stream | None = None) -> None:
        self.number, self.stream = TAPE.number(), stream.name if stream else TAPE.stream
        TAPE.add(Mark(self.number, self.stream))

    def wait(self, stream: Stream | None = None) -> None:
        (stream or DeviceModule.current_stream()).wait_event(self)

    def synchronize(self) -> None:
        TAPE.add(HostWait("event.synchronize", self.stream, TAPE.phase, TAPE.caller()))

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds. The device has passed both events, or CUDA raises: nobody waits."""
        return 0.0


class DeviceModule:
    """What torch expects at `torch.gpu`."""

    Stream = Stream
    Event = Event
    streams = {MAIN: Stream(name=MAIN)}

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def set_device(index: int) -> None:
        pass

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @classmethod
    def current_stream(cls, device: Any = None) -> Any:
        return cls.streams.setdefault(TAPE.stream, Stream(name=TAPE.stream))

    @staticmethod
    @contextmanager
    def stream(stream: Any) -> Iterator[None]:
        with TAPE.on(stream.name if stream else TAPE.stream):
            yield


class Work(dist.Work):
    """A collective that has been launched. Waiting for it makes the current stream wait, as with NCCL, not the host."""

    def __init__(self, number: int, result: Any) -> None:
        super().__init__()
        self.number, self._result = number, result

    def wait(self, timeout: Any = None) -> bool:
        TAPE.add(Await(TAPE.stream, self.number))
        return True

    def is_completed(self) -> bool:
        return True

    def result(self) -> Any:
        return self._result

    def get_future(self) -> torch.futures.Future[Any]:
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(self._result)
        return future


class Group(dist.ProcessGroup):
    """A process group that writes down its collectives. Bytes sent are a ring's: (n - 1) / n of what is gathered or reduced."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._at, self._size = rank, size

    @property
    def pg_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    @property
    def group_name(self) -> Any:
        return self.pg_name

    def getBackendName(self) -> str:
        return "rehearsal"

    def size(self) -> int:
        return self._size

    def _log(self, name: str, tensor: Tensor, sent: int, result: Any) -> Work:
        ranks = tuple(dist.get_process_group_ranks(self)) if dist.is_initialized() else ()
        number = TAPE.number()
        group = name_of(ranks)
        entry = Collective(name, group, ranks, TAPE.stream, TAPE.phase, TAPE.where, str(tensor.dtype), sent, number)
        TAPE.add(entry)
        return Work(number, result)

    def _ring(self, tensor: Tensor, times: int = 1) -> int:
        return times * tensor.numel() * tensor.element_size() * (self._size - 1) // self._size

    def allreduce(self, tensors: Any, opts: Any = None) -> Work:  # type: ignore[override]
        return self._log("all_reduce", tensors[0], self._ring(tensors[0], 2), tensors)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Work:
        return self._log("all_gather", output, self._ring(output), output)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Work:
        return self._log("reduce_scatter", input, self._ring(input), output)

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int], opts: Any = None
    ) -> Work:
        row = input[0].numel() if input.dim() > 1 else 1
        mine = input_splits[self._at] * row if input_splits else input.numel() // self._size
        return self._log("all_to_all", input, (input.numel() - mine) * input.element_size(), output)

    def device_all_to_all(self, input: Tensor, rows: int) -> None:
        """`rows` to each rank, as the device reads; what the current stream does next comes behind it."""
        self._log(
            "all_to_all_vdev", input, (self._size - 1) * rows * input[0].numel() * input.element_size(), None
        ).wait()

    def broadcast(self, tensors: Any, opts: Any = None) -> Work:  # type: ignore[override]
        return self._log("broadcast", tensors[0], self._ring(tensors[0]), tensors)

    def barrier(self, opts: Any = None) -> Work:
        return self._log("barrier", torch.empty(0), 0, None)


def name_of(ranks: tuple[int, ...]) -> str:
    """'8 ranks, every 4th' and the like."""
    if len(ranks) < 2:
        return "1 rank"
    step = ranks[1] - ranks[0]
    return f"{len(ranks)} neighbours" if step == 1 else f"{len(ranks)} ranks, every {step}th"


class _Store(torch._C._distributed_c10d.Store):
    """Never asked: nobody has to be found."""


def install(world_size: int, rank: int = 0) -> torch.device:
    """Make this process rank `rank` of `world_size` with the device; returns the device."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(rename=NAME, backend_module=DeviceModule())
        library = torch.library.Library("aten", "IMPL")
        library.impl("empty.memory_format", _empty, "PrivateUse1")
        _KEPT.append(library)
        dist.Backend.register_backend(
            "rehearsal",
            lambda common, _: Group(common.group_rank, common.group_size),
            extended_api=True,
            devices=["cpu", NAME],
        )
    dist.init_process_group("rehearsal", rank=rank, world_size=world_size, store=_Store())
    return torch.device(NAME, 0)


_KEPT: list[torch.library.Library] = []


def _empty(size: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    """Of the few tensors that torch makes outside of fake mode, all of them empty."""
    return torch._C._acc.create_empty_tensor(tuple(size), dtype or torch.get_default_dtype())
