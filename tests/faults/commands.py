"""The command that users train with, on a Ray of its own or one that it joins, and the processes of that Ray."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from jobs.on_ray import keeper
from jobs.on_ray.local import PREFIX
from tests.faults.runs import LIMIT_S, Log, Place, now, plain_environment
from tests.faults.table import REPOSITORY
from tests.signals import heed_sigint

KINDS = {
    "worker": re.compile("RayTrainWorker"),
    "raylet": re.compile(r"/raylet/raylet "),
    "gcs": re.compile(r"/gcs/gcs_server "),
}


class Command:
    """`python -m jobs.<module> --config ... [overrides]` in a session of its own; what it prints gets the time of each line."""

    def __init__(self, place: Place, *more: str, module: str = "jobs.pipeline", **environment: str) -> None:
        self.log = Log(place.folder / f"command-{len(list(place.folder.glob('command-*')))}")
        only = ["--only", "train"] if module == "jobs.pipeline" else []
        self.temporary = Path(tempfile.mkdtemp(prefix="f-", dir="/tmp"))  # Ray's sockets need a short path
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *only, *place.settings(*more)],
            cwd=REPOSITORY,
            env={**plain_environment(), "TMPDIR": str(self.temporary), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=heed_sigint,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.log.path.open("a", buffering=1) as file:
            for line in self.process.stdout:
                file.write(f"{now():.3f} {line}")

    def wait(self, limit: float = LIMIT_S) -> int:
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {limit:.0f} s:\n{self.log.text}") from None
        finally:
            self.ended = now()
            self._reader.join(5)

    def wait_for(self, condition: Callable[[], Any], limit: float = LIMIT_S) -> Any:
        """Until it holds; what it returned. Fails if the command ends first."""
        deadline = time.monotonic() + limit
        while not (found := condition()):
            assert self.process.poll() is None, self.log.text
            assert time.monotonic() < deadline, self.log.text
            time.sleep(0.05)
        return found

    def members(self, kind: str = "") -> list[psutil.Process]:
        """The processes of its local Ray; `kind`: of these the workers, or the one raylet or gcs."""
        found = [each for folder in self.temporary.glob(f"{PREFIX}*") for each in keeper.members(str(folder))]
        return [each for each in found if not kind or KINDS[kind].search(_command_line(each))]

    def end(self) -> None:
        """Whatever a failed test has left."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for folder in self.temporary.glob(f"{PREFIX}*"):
            keeper.end(str(folder))
        shutil.rmtree(self.temporary, ignore_errors=True)  # two commands may have shared it

    def check_nothing_left(self) -> None:
        """No process and no folder of its Ray, a moment after its end."""
        deadline = time.monotonic() + 30
        while (left := [*self.members(), *self.temporary.glob(f"{PREFIX}*")]) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert left == []


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""
