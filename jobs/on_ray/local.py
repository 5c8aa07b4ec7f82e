"""A Ray of this machine alone, for the length of one command.

It listens on the loopback address only and asks for a token that only this user can read, so nobody on the network, and nobody
else on the machine, can run code in it. Its ports are whatever is free: any number of local clusters run side by side. A keeper
(keeper.py) ends it with the command, also when that is killed; what a killed keeper left is ended by the next command.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from jobs.on_ray import keeper
from pipeline.config.load import ConfigError

PREFIX = "moonlight-ray-"
OWNER = "owner"  # file: who began the cluster, as `pid created`
# Ray's switch for "this machine only", as on a laptop with macOS: its node is 127.0.0.1. The second is what Ray makes of the first
# when it is imported, which in this process may have been long ago.
LOOPBACK, LOOPBACK_CONSTANT = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "ENABLE_RAY_CLUSTER"
TOKEN = "token"
EVALUATOR = "evaluator"  # a custom resource of Ray: nodes that offer it are where followers work (task.py)
_token = secrets.token_hex(32)  # one a process: Ray reads it once


@contextlib.contextmanager
def local_cluster(cpus: int, object_store_bytes: int, *, dashboard: bool) -> Iterator[str]:
    """Start a cluster and yield its address; the environment of this process is set for it. Raises ConfigError with Ray's last words."""
    end_abandoned()
    folder = tempfile.mkdtemp(prefix=PREFIX)
    Path(folder, OWNER).write_text(_identity(psutil.Process()))
    _write_token(Path(folder, TOKEN))
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(Path(folder, TOKEN))}
    arguments = [
        "--node-ip-address=127.0.0.1",
        "--port=0",  # whoever listens chooses a free one: a port that was free a moment ago may be taken by Ray's other processes
        "--dashboard-agent-listen-port=0",
        f"--include-dashboard={'true' if dashboard else 'false'}",
        "--dashboard-host=127.0.0.1",
        "--dashboard-port=0",
        f"--num-cpus={cpus}",
        f"--object-store-memory={object_store_bytes}",
        f"--resources={json.dumps({EVALUATOR: 1})}",  # a follower may work here, behind training
        "--disable-usage-stats",
    ]
    with _environment({LOOPBACK: "0", **token}), _told_to_ray():
        process = _keep(folder, arguments)
        try:
            yield _address(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
            keeper.end(folder)  # in case the keeper was killed


def _keep(folder: str, arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", keeper.__name__, folder, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, keeper.MARK: folder, "PYTHONPATH": with_this_code()},
    )


def _address(process: subprocess.Popen[str]) -> str:
    """Waits for the start."""
    assert process.stdout is not None
    assert process.stderr is not None
    address = process.stdout.readline().strip()
    if not address:
        raise ConfigError(f"a local Ray does not start: {_last_words(process.stderr.read())}")
    return address


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _told_to_ray() -> Iterator[None]:
    """For the Ray of this process, which may have read its environment already."""
    from ray._private import ray_constants
    from ray._raylet import Config  # type: ignore[attr-defined]

    before = getattr(ray_constants, LOOPBACK_CONSTANT)
    setattr(ray_constants, LOOPBACK_CONSTANT, False)
    Config.initialize("")  # reads RAY_AUTH_MODE
    try:
        yield
    finally:
        setattr(ray_constants, LOOPBACK_CONSTANT, before)


def end_abandoned() -> None:
    """End the clusters of this user whose command and keeper were both killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            pid, _, _ = (owner := (folder / OWNER).read_text()).partition(" ")
            if folder.stat().st_uid != os.getuid() or (
                psutil.pid_exists(int(pid)) and _identity(psutil.Process(int(pid))) == owner
            ):
                continue
        except (FileNotFoundError, ValueError, PermissionError, psutil.NoSuchProcess):
            continue  # just being made or deleted
        keeper.end(str(folder))


def _identity(process: psutil.Process) -> str:
    return f"{process.pid} {process.create_time()}"


def _write_token(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(_token)


def with_this_code() -> str:
    """PYTHONPATH of a process that is to find this code first."""
    return os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])


def _last_words(text: str) -> str:
    return " ".join(text.split()[-60:]) or "it said nothing"
