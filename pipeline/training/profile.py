"""A close look at some steps of a rank: torch's profiler, and a snapshot of its memory.

    rank-00000.trace.json.gz      every operator, kernel and collective, with shapes, stacks and memory: Perfetto, chrome://tracing
    rank-00000.memory.pickle      every allocation: torch's memory_viz, on the web or as a script

What is to be profiled is said by `training.profile`, or asked of a run that is at work (profiles.py). The profiled steps are slower, by
the profiler and by the waits at their begin and end; others cost nothing. What cannot be stored is said, and training goes on.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from botocore.exceptions import BotoCoreError
from torch.cuda._memory_viz import _profile_to_snapshot
from torch.profiler import ProfilerActivity

from pipeline.background import Background
from pipeline.config.schema import RunConfig
from pipeline.manifest import DamagedRecord
from pipeline.storage import Storage, said_by_storage
from pipeline.training import profiles
from pipeline.training.profiles import Request, profile_folder, read_request

EVENTS = 200_000  # of the CUDA allocator that are remembered


class Profiler(Background):
    """Of one rank: `with Profiler(...) as profiler`, then `before` and `after` every step."""

    def __init__(self, config: RunConfig, storage: Storage, rank: int, device: torch.device) -> None:
        super().__init__("profile-requests", patience_s=profiles.LOOK_S)
        self._run_id, self._storage, self._rank, self._device = config.run_id, storage, rank, device
        wanted = config.training.profile
        self._wanted = None if wanted is None else Request(steps=wanted.steps, ranks=wanted.ranks)
        self._asked: Request | None = None
        self._running: Any = None
        self._first = self._last = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if self._running is not None:
            self._stop()

    def before(self, step: int) -> None:
        """The step begins."""
        for request in (self._wanted, self._asked):
            if self._running is None and request is not None and self._rank in request.ranks:
                first, last = request.steps
                if first <= step <= last:
                    self._first, self._last = step, last
                    self._start()

    def after(self, step: int) -> None:
        """The step has been handed to the device."""
        if self._running is not None and step >= self._last:
            self._stop()

    def work(self) -> float:
        """Looks for requests. Where storage is away a later look may find one."""
        with contextlib.suppress(OSError, BotoCoreError, DamagedRecord):
            self._asked = read_request(self._storage, self._run_id)
        return profiles.LOOK_S

    def _start(self) -> None:
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.memory._record_memory_history(max_entries=EVENTS)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        # names and sizes of what is allocated need stacks and shapes
        self._running = torch.profiler.profile(
            activities=activities, record_shapes=True, profile_memory=True, with_stack=True
        )
        self._running.start()

    def _stop(self) -> None:
        profile, self._running = self._running, None
        profile.stop()
        with tempfile.TemporaryDirectory(prefix="profile-") as folder:
            trace = Path(folder, "trace.json.gz")
            profile.export_chrome_trace(str(trace))
            if self._device.type == "cuda":
                snapshot = torch.cuda.memory._snapshot()
                torch.cuda.memory._record_memory_history(enabled=None)
            else:
                snapshot = _memory_of(profile)
            where = f"{profile_folder(self._run_id, self._first)}/rank-{self._rank:05d}"
            try:
                self._storage.write(f"{where}.trace.json.gz", trace.read_bytes())
                if snapshot is not None:
                    self._storage.write(f"{where}.memory.pickle", pickle.dumps(snapshot))
            except (OSError, BotoCoreError) as error:
                print(f"profile not stored: {said_by_storage(error)}; training goes on", file=sys.stderr, flush=True)
                return
        steps = f"steps {self._first} to {self._last}"
        print(f"profile of {steps} on rank {self._rank}: {self._storage.uri(where)}.*", flush=True)


def _memory_of(profile: torch.profiler.profile) -> Any:
    """What a CPU's memory held, for `memory_viz`; None where torch's own analysis of the recorded operators contradicts itself (2.13 takes
    some addresses that are used again for one tensor). A look at a run never ends it."""
    try:
        return _profile_to_snapshot(profile)
    except (AssertionError, KeyError, IndexError, ValueError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        print(
            f"no memory snapshot: torch cannot make one of this profile ({why}); its trace is stored",
            file=sys.stderr,
            flush=True,
        )
        return None
