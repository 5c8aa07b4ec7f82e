"""Starts a local Ray for one command and takes it down when that command ends, however it ends.

    python -m jobs.on_ray.keeper <folder> [arguments of `ray start --head`]

It runs in a session of its own, so that Ctrl-C in a terminal reaches the command and not the cluster under it. Its standard input
is a pipe that the command holds open and writes nothing to: when the kernel closes it, after `kill -9` too, the keeper ends every
process of the cluster and deletes the folder. It does the same when the raylet or the GCS dies: without one of them the rest is of
no use, and would say for ever that its jobs are running. On standard output: one line, the cluster's address, or nothing and
status 1 with Ray's own words on standard error.

It adopts what the cluster's processes leave behind and reaps it. Else that is the machine's first process's to do, which in a
container may be the command itself; and Ray waits for a stopped job's processes as long as the kernel lists them, dead or not.

The processes of a cluster are known by an environment variable that they all inherit, wherever they have been adopted.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

MARK = "MOONLIGHT_LOCAL_RAY"
GRACE_S = 1.0  # between SIGTERM and SIGKILL: nothing in a local cluster is worth waiting for
PARTS = ("raylet", "gcs_server")  # that Ray cannot be without
LOOK_S = 1.0
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def main(folder: str, arguments: list[str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the pipe says when to end
    adopt_orphans()
    os.environ[MARK] = folder
    os.environ["RAY_START_HOOK"] = "jobs.on_ray.keeper.without_client_server"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--temp-dir", folder, *arguments]
    try:
        started = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if started.returncode:
            print(started.stdout, started.stderr, sep="\n", file=sys.stderr)
            return 1
        print(Path(folder, "ray_current_cluster").read_text(), flush=True)
        parts = [process for process in members(folder) if process.name() in PARTS]
        while not select.select([sys.stdin], [], [], LOOK_S)[0]:
            reap()
            if not all(_lives(part) for part in parts):
                return 1
    finally:
        end(folder)
    return 0


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def adopt_orphans() -> None:
    """From now on whoever descends from this process and loses its parent becomes its child. Linux alone knows that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap() -> None:
    """Let go of all children that have ended. Nobody else here may wait for one."""
    with contextlib.suppress(ChildProcessError):  # there is none
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def without_client_server(parameters: Any, head: bool) -> None:
    """Ray's hook before a start: nobody uses the Ray client's server, a process and an open port more."""
    del head
    parameters.ray_client_server_port = None


def end(folder: str) -> None:
    """End all processes of the cluster in `folder`, but not this one, and delete the folder."""
    stop_at = time.monotonic() + GRACE_S
    while left := members(folder):
        for process in left:
            try:
                process.terminate() if time.monotonic() < stop_at else process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=0.5)
    shutil.rmtree(folder, ignore_errors=True)  # another one that ends the same cluster may be faster


def members(folder: str) -> list[psutil.Process]:
    """The processes of the cluster in `folder`, this one and zombies left out."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.pid != os.getpid()
                and process.status() != psutil.STATUS_ZOMBIE
                and process.environ().get(MARK) == folder
            ):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # gone meanwhile, or somebody else's
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
