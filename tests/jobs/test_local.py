"""A local Ray: closed to the network and to other users, and gone with its command however that ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from jobs.on_ray import keeper
from jobs.on_ray.local import OWNER, PREFIX, TOKEN, end_abandoned

COMMAND = """
import os, signal
import ray
from jobs.on_ray.cluster import connect
from pipeline.config.load import load_config

with connect(load_config("debug", []), dashboard=True) as dashboard:
    worker = ray.get(ray.remote(lambda: os.getpid()).remote())
    print(dashboard, os.path.dirname(os.environ["RAY_AUTH_TOKEN_PATH"]), worker, flush=True)
    signal.pause()
"""


@pytest.fixture
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short path: Ray's sockets are below it."""
    folder = Path("/tmp") / f"ml-{os.getpid()}"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield folder
    for each in folder.iterdir():
        keeper.end(str(each))
    folder.rmdir()


def test_a_local_cluster(temporary: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"TMPDIR": str(temporary), "RAY_USAGE_STATS_ENABLED": "0"}
    command = subprocess.Popen([sys.executable, "-c", COMMAND], stdout=subprocess.PIPE, text=True, env=environment)
    assert command.stdout is not None
    told = next(line for line in command.stdout if not line.startswith("Ray "))  # what is being started
    dashboard, folder, worker = told.split()
    members = {process.pid for process in keeper.members(folder)}
    assert int(worker) in members
    (keeps,) = [each for each in psutil.Process(command.pid).children() if keeper.__name__ in each.cmdline()]
    parts = {each.name(): each.ppid() for each in keeper.members(folder) if each.name() in keeper.PARTS}
    assert parts == dict.fromkeys(keeper.PARTS, keeps.pid)  # which Ray has started in the background

    # No listener of ours beyond loopback, and a request without the token is refused.
    listening = [
        each
        for each in psutil.net_connections("inet")
        if each.status == psutil.CONN_LISTEN and each.pid in members | {command.pid}
    ]
    assert len(listening) > 5
    assert {each.laddr.ip.removeprefix("::ffff:") for each in listening} == {"127.0.0.1"}
    assert (Path(folder, TOKEN).stat().st_mode & 0o777) == 0o600
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{dashboard}/api/jobs/", timeout=60)
    token = {"Authorization": f"Bearer {Path(folder, TOKEN).read_text()}"}
    with urllib.request.urlopen(urllib.request.Request(f"{dashboard}/api/jobs/", headers=token), timeout=60) as answer:
        assert answer.status == 200

    # The agent takes jobs, on whatever port it found.
    submission = urllib.request.Request(f"{dashboard}/api/jobs/", json.dumps({"entrypoint": "true"}).encode(), token)
    with urllib.request.urlopen(submission, timeout=60) as answer:
        assert json.load(answer)["submission_id"]

    command.send_signal(signal.SIGKILL)
    command.wait()
    wait_until_gone(folder)


UNTIL_TOLD = """
import sys
from jobs.on_ray.local import local_cluster
with local_cluster(1, 80_000_000, dashboard=False):
    print("up", flush=True)
    sys.stdin.read()
"""


ADOPTS = """
import os, subprocess, time
import psutil
from jobs.on_ray import keeper

keeper.adopt_orphans()
out = subprocess.run(["sh", "-c", "sleep 600 >/dev/null & echo $!"], stdout=subprocess.PIPE)
orphan = psutil.Process(int(out.stdout))
assert orphan.ppid() == os.getpid(), orphan.ppid()
keeper.reap()
assert orphan.is_running()
orphan.kill()
while orphan.is_running():  # a zombie is, too
    keeper.reap()
    time.sleep(0.01)
keeper.reap()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has subreapers")
def test_orphans_are_adopted_and_reaped() -> None:
    """As the first process of a machine does it; a command that stands in its place in a container does not."""
    subprocess.run([sys.executable, "-c", ADOPTS], check=True, timeout=120)


def test_a_cluster_that_lost_a_part_is_ended_whole(temporary: Path) -> None:
    """Or its job server would say for ever that its jobs are running. In a process of its own: Ray keeps the settings of the first one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"TMPDIR": str(temporary), "RAY_USAGE_STATS_ENABLED": "0"}
    command = subprocess.Popen(
        [sys.executable, "-c", UNTIL_TOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert command.stdout is not None
    assert command.stdout.readline() == "up\n"
    (folder,) = (str(each) for each in temporary.glob(f"{PREFIX}*"))
    (raylet,) = (process for process in keeper.members(folder) if process.name() == "raylet")
    assert len(keeper.members(folder)) > 2
    raylet.kill()
    wait_until_gone(folder)
    command.communicate(timeout=120)


def wait_until_gone(folder: str) -> None:
    for _ in range(600):
        if not keeper.members(folder) and not Path(folder).exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"left: {keeper.members(folder)}, {list(Path(folder).rglob('*'))[:5]}")


def test_what_a_killed_keeper_left_is_ended_by_the_next_command(temporary: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    folders = {}
    for name, owner in (
        ("abandoned", f"{dead.stdout.strip()} 1.0"),
        ("reused", f"{os.getpid()} 1.0"),
        ("alive", f"{os.getpid()} {psutil.Process().create_time()}"),
    ):
        folders[name] = temporary / f"{PREFIX}{name}"
        folders[name].mkdir()
        (folders[name] / OWNER).write_text(owner)
    environment = {**os.environ, keeper.MARK: str(folders["abandoned"])}
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    left = subprocess.Popen([sys.executable, "-c", stubborn], env=environment, stdout=subprocess.PIPE)
    assert left.stdout is not None
    left.stdout.readline()
    end_abandoned()
    assert left.poll() is not None  # it would have slept on
    assert [name for name, folder in folders.items() if folder.exists()] == ["alive"]


def test_a_cluster_that_does_not_start_says_why(temporary: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", keeper.__name__, str(temporary / "x"), "--num-cpus=-1"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "num_cpus" in done.stderr or "num-cpus" in done.stderr or "CPU" in done.stderr
