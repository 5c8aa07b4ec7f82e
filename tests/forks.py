"""Processes of tests that begin with everything imported: PyTorch and what a run needs cost three CPU seconds of each that is spawned.

They are forked from two servers, processes with one thread that import and never compute. Two, because ranks must be free to
differ where those of a real run do: each server draws its own PYTHONHASHSEED, so neighbouring ranks walk a set of strings in
different orders, and what launches collectives in such an order fails here as it would there.

A process gets the environment, working directory, stdout and stderr that the test has when it starts it.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from types import FunctionType
from typing import Any

IMPORTED = ("torch.distributed.checkpoint", "torch.distributed.fsdp", "pipeline.training.trainer")
SERVERS = 2


def fork(number: int, target: Callable[..., None], *args: Any) -> tuple[int, Connection]:
    """Runs `target(pipe, *args)` in a process. Returns its id and the other end of the pipe, which ends when the process does.

    `number` of those that a test starts together; `args` are passed by value."""
    process, server = _server(number % SERVERS)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    modules = {each.__module__ for each in (target, *args) if isinstance(each, FunctionType)}
    server.send_bytes(pickle.dumps((sorted(modules), dict(os.environ), os.getcwd())))
    server.send_bytes(pickle.dumps((target, args)))
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for handle in (theirs.fileno(), 1, 2):
        send_handle(server, handle, process.pid)
    theirs.close()
    found = server.recv()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found, ours


@cache
def _server(_: int) -> tuple[Any, Connection]:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _serve(parent: Any) -> None:
    """Until the parent is gone. One task is two messages and three open files; the answer is the process's id, or what went wrong."""
    for name in IMPORTED:
        importlib.import_module(name)
    while True:
        try:
            modules, environment, folder = pickle.loads(parent.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        task = parent.recv_bytes()
        handles = [recv_handle(parent) for _ in range(3)]
        while _ended():
            pass
        try:
            for name in modules:
                importlib.import_module(name)  # the next one finds it
            gc.collect()
            gc.freeze()  # pages that a collection in a child would copy
            assert threading.active_count() == 1, (
                f"importing {' or '.join(modules)} starts a thread, which a fork would lose"
            )
            child = os.fork()
        except BaseException:
            parent.send(traceback.format_exc())
            continue
        if not child:
            parent.close()
            _run(task, environment, folder, *handles)
        for handle in handles:
            os.close(handle)
        parent.send(child)


def _ended() -> bool:
    """Whether there was a child that had ended: it is reaped."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def _run(task: bytes, environment: dict[str, str], folder: str, pipe: int, out: int, err: int) -> None:
    code = 1
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.close(out)
        os.close(err)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        gc.unfreeze()
        target, args = pickle.loads(task)
        target(Connection(pipe, readable=False), *args)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # no server's exit handlers; the exit of a process with gloo threads can be noisy
