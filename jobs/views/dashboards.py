"""`moonlight dashboards`: a Prometheus and a Grafana of this machine beside a Ray that runs on it, for as long as the command.

Ray's dashboard writes what is to be scraped into its session's folder (`metrics/prometheus/prometheus.yml`), and its own boards beside it,
where our boards are put, too. Ray's Metrics pages expect Prometheus at port 9090 and Grafana at 3000 unless it was started with RAY_PROMETHEUS_HOST
and RAY_GRAFANA_HOST. Both listen on the loopback address only, and what they keep goes with them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import yaml

from jobs.boards.board import write
from jobs.cli import program, refusing
from jobs.on_ray.local import PREFIX
from jobs.on_ray.signals import Interrupted, raise_on_signals
from pipeline.config.load import ConfigError

LOCAL = ("training", "data")  # boards; the third is about Kubernetes
PATIENCE_S = 60.0  # until a server answers
LOOK_S = 1.0
GRAFANA_HOME = Path("/usr/share/grafana")  # of its packages
INSTALL = "Debian and Ubuntu have it as the package prometheus; elsewhere see https://prometheus.io/download"
NO_GRAFANA = "not installed (https://grafana.com/grafana/download): the boards wait in"


@refusing
def command(arguments: Sequence[str] | None) -> int:
    """`jobs.dashboards`. Returns the exit code."""
    made = argparse.ArgumentParser(
        prog=program("dashboards"), description="Start Prometheus and Grafana beside the Ray that runs on this machine."
    )
    made.add_argument("--ray", type=Path, metavar="FOLDER", help="of its sessions; default: the newest on this machine")
    made.add_argument("--prometheus-port", type=int, default=9090, help="default: 9090, where Ray's dashboard looks")
    made.add_argument("--grafana-port", type=int, default=3000, help="default: 3000, where Ray's dashboard looks")
    given = made.parse_args(arguments)
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        raise ConfigError(f"prometheus: there is no such program on PATH; {INSTALL}")
    metrics = find_metrics(given.ray)
    boards = write(metrics / "grafana" / "dashboards", LOCAL)[0].parent
    try:
        raise_on_signals()
        with contextlib.ExitStack() as stack:
            data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moonlight-dashboards-")))
            url = f"http://127.0.0.1:{given.prometheus_port}"
            servers = [stack.enter_context(_prometheus(prometheus, metrics, data, url))]
            print(f"Prometheus  {url}  scrapes the Ray of {metrics.parent}", flush=True)
            grafana = shutil.which("grafana-server")
            if grafana is None:
                print(f"Grafana     {NO_GRAFANA} {boards}", flush=True)
            else:
                servers.append(stack.enter_context(_grafana(grafana, boards, data, url, given.grafana_port)))
                print(f"Grafana     http://127.0.0.1:{given.grafana_port}/d/moonlight", flush=True)
            print("Ctrl-C ends them", flush=True)
            while metrics.exists() and all(server.poll() is None for server in servers):
                time.sleep(LOOK_S)
    except Interrupted:
        return 0
    print("the Ray that was watched is gone" if not metrics.exists() else "a server has ended", file=sys.stderr)
    return 1


def find_metrics(folder: Path | None) -> Path:
    """`metrics` of the newest session below a folder of Ray's, or of any on this machine. Raises ConfigError."""
    temporary = Path(tempfile.gettempdir())
    folders = [folder] if folder else [temporary / "ray", *temporary.glob(f"{PREFIX}*")]
    found = [each / "session_latest" / "metrics" for each in folders]
    found = [each.resolve() for each in found if (each / "prometheus" / "prometheus.yml").exists()]
    if not found:
        where = f"{folder}: it holds no" if folder else "no"
        raise ConfigError(
            f"{where} session of a Ray with a dashboard; start one (ray start --head, or moonlight run), or name its folder with --ray"
        )
    return max(found, key=lambda each: each.stat().st_mtime)


@contextlib.contextmanager
def _prometheus(command: str, metrics: Path, data: Path, url: str) -> Iterator[subprocess.Popen[bytes]]:
    arguments = [
        command,
        f"--config.file={metrics / 'prometheus' / 'prometheus.yml'}",
        f"--storage.tsdb.path={data / 'prometheus'}",
        f"--web.listen-address={url.removeprefix('http://')}",
    ]
    with _server("prometheus", arguments, data, f"{url}/-/ready", "--prometheus-port") as started:
        yield started


@contextlib.contextmanager
def _grafana(command: str, boards: Path, data: Path, prometheus: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """As Ray's own configuration of it, but with the Prometheus that was started."""
    provisioning = data / "provisioning"
    source = {"name": "Prometheus", "type": "prometheus", "access": "proxy", "url": prometheus, "isDefault": True}
    provider = {"name": "Ray", "folder": "Ray", "type": "file", "options": {"path": str(boards)}}
    _provision(provisioning / "datasources" / "ray.yml", {"datasources": [source]})
    _provision(provisioning / "dashboards" / "ray.yml", {"providers": [provider]})
    settings = {
        "GF_PATHS_DATA": str(data / "grafana"),
        "GF_PATHS_PROVISIONING": str(provisioning),
        "GF_SERVER_HTTP_ADDR": "127.0.0.1",
        "GF_SERVER_HTTP_PORT": str(port),
        "GF_SECURITY_ALLOW_EMBEDDING": "true",  # Ray's dashboard shows its panels in frames
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
    }
    arguments = [command, f"--homepath={GRAFANA_HOME}"]
    with _server(
        "grafana", arguments, data, f"http://127.0.0.1:{port}/api/health", "--grafana-port", settings
    ) as started:
        yield started


def _provision(path: Path, values: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump({"apiVersion": 1, **values}))


@contextlib.contextmanager
def _server(
    name: str, arguments: list[str], data: Path, ready: str, option: str, settings: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers, ended with the block. Raises ConfigError with its last words."""
    log = data / f"{name}.log"
    with log.open("wb") as output:
        started = subprocess.Popen(
            arguments,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(settings or {})},
            start_new_session=True,
        )
    try:
        if not _answers(ready, lambda: started.poll() is None):
            words = " ".join(log.read_text(errors="replace").split()[-40:])
            raise ConfigError(
                f"{option}: {name} does not answer at {ready}: {words}; give another port, or end what is there"
            )
        yield started
    finally:
        started.terminate()
        try:
            started.wait(10)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def _answers(url: str, lives: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while lives() and time.monotonic() < deadline:
        try:
            with urlopen(url, timeout=5):
                return lives()  # not somebody else's, whose port this one was refused
        except (URLError, OSError):
            time.sleep(0.2)
    return False
