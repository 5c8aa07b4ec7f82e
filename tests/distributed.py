"""Real process groups for tests: `run_distributed(fn, world, *args)` runs `fn(*args)` on `world` gloo ranks.

Every rank is a process of its own with one thread, forked from one that has imported what it needs (`tests/forks.py`); the
ranks meet through a file in a temporary folder, so tests running side by side never share a port. `fn` must be importable (a module-level function of the test file) and finds
`torch.distributed` initialised. What the ranks return comes back as a list, rank 0 first; it must be picklable.

An exception on any rank is re-raised here with the tracebacks of all ranks that failed, and ends the others at once:
they would wait in a collective for ever. A run that exceeds `timeout` seconds is ended and fails.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from tests.forks import fork

GRACE_S = 2.0  # after the first failure: how long other ranks may take to report theirs


def run_distributed(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 240.0) -> list[Any]:
    """`[fn(*args) of rank 0, ..., of rank world-1]`."""
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = [fork(rank, _rank, fn, args, rank, world, f"{folder}/store", timeout) for rank in range(world)]
        try:
            return _collect([pipe for _, pipe in ranks], time.monotonic() + timeout, timeout)
        finally:
            for process, pipe in ranks:
                if not _ends(pipe, within=0.5):
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                    _ends(pipe, within=10)  # not for ever: a child of it may hold the pipe, too
                pipe.close()


def _ends(pipe: Any, within: float) -> bool:
    """Whether the process at the other end does, within so many seconds: it holds the pipe as long as it lives."""
    try:
        while pipe.poll(within):
            pipe.recv_bytes()
    except (EOFError, ConnectionResetError):
        return True
    return False


def _collect(pipes: list[Any], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = dict(enumerate(pipes))
    while waiting:
        left = deadline - time.monotonic()
        ready = multiprocessing.connection.wait(list(waiting.values()), max(left, 0))
        if not ready:
            if failures:
                break
            raise TimeoutError(f"ranks {sorted(waiting)} of {len(pipes)} did not finish within {timeout:.0f} s")
        for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
            try:
                succeeded, value = pickle.loads(waiting.pop(rank).recv_bytes())
            except EOFError:
                succeeded, value = False, "the process ended without a word (killed, or out of memory)"
            if succeeded:
                results[rank] = value
            else:
                failures[rank] = value
                deadline = min(deadline, time.monotonic() + GRACE_S)
    if failures:
        raise RuntimeError(
            "\n".join(f"rank {rank} of {len(pipes)} failed:\n{failures[rank]}" for rank in sorted(failures))
        )
    return [results[rank] for rank in range(len(pipes))]


def _rank(pipe: Any, fn: Callable[..., Any], args: tuple, rank: int, world: int, store: str, timeout: float) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the ranks share a machine, whatever its name resolves to
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
        )
        value = fn(*args)
        pipe.send_bytes(pickle.dumps((True, value)))  # by value: no tensor is shared with a process about to end
        dist.destroy_process_group()
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
