"""`moonlight dashboards`: a real Prometheus scrapes a real Ray, and every query of every panel of our boards finds series."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from jobs.boards.board import BOARDS, board, write
from jobs.dashboards import main
from tests.k8s.manifests import REPOSITORY
from tests.signals import heed_sigint

ON_KUBERNETES = "cluster"  # the board of series that only KubeRay, Kueue and GPUs have
PATIENCE_S = 300.0

WORK = """
import sys, time
from pathlib import Path
import ray
from data_prep.records import PrepareProgress
from jobs.on_ray.gauges import PrepareGauges, TrainingGauges
from pipeline.config.schema import StorageConfig
from pipeline.report.run import read_run
from pipeline.storage import open_storage
from tests.report.make import recorded

folder = sys.argv[1]
ray.init(runtime_env={"env_vars": {"PYTHONPATH": sys.argv[2], "OMP_NUM_THREADS": "1"}})
storage = open_storage(StorageConfig(root=folder))
gauges = TrainingGauges(storage, "watched")
times = {"seconds_" + phase: 0.5 for phase in ("data", "compute", "exchange", "optimizer", "save", "other")}
recorded(storage, "watched", mfu=0.3, memory_peak_bytes=2e9, flops_per_second=1e12, slowest_rank=1, slowest_phase="data", slowest_seconds=0.2, seconds=3.0, **times)
prepare = PrepareGauges("watched", then=lambda at: None)
for number in range(1, 10**6):
    gauges(read_run(storage, "watched"))
    prepare(PrepareProgress("tokenize", number % 8, 8, 0, documents=number, text_bytes=7 * number, tokens=11 * number, seconds=number / 2))
    ray.data.range(8, override_num_blocks=4).map(lambda row: time.sleep(0.3) or row).materialize()
"""  # the gauges of a run as drivers set them, and Ray Data at work


def test_the_boards_of_kubernetes_are_those_of_the_code(tmp_path: Path) -> None:
    folder = REPOSITORY / "k8s/monitoring/dashboards"
    written = {path.name: path.read_text() for path in write(tmp_path)}
    assert written == {path.name: path.read_text() for path in folder.iterdir()}, "make boards"


@pytest.mark.parametrize("name", BOARDS)
def test_panels_have_a_place_each(name: str) -> None:
    found = board(name)["panels"]
    assert len({panel["id"] for panel in found}) == len({panel["title"] for panel in found}) == len(found)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in found}
    assert len(places) == len(found)
    assert all(x + panel["gridPos"]["w"] <= 24 for (x, _), panel in zip(places, found))


def test_without_prometheus_or_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([]) == 2
    assert capsys.readouterr().err == (
        "error: prometheus: there is no such program on PATH; Debian and Ubuntu have it as the package prometheus; elsewhere see "
        "https://prometheus.io/download\n"
    )
    (tmp_path / "prometheus").touch(mode=0o755)
    assert main(["--ray", str(tmp_path)]) == 2
    said = f"error: {tmp_path}: it holds no session of a Ray with a dashboard; start one (ray start --head, or moonlight run), or name its folder with --ray\n"
    assert capsys.readouterr().err == said


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[str]:
    """The address of the one that `moonlight dashboards` starts beside a Ray with work to do."""
    from jobs.on_ray.local import local_cluster

    environment = {
        "PYTHONPATH": str(REPOSITORY),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_metrics_report_interval_ms": "1000",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with local_cluster(2, 200_000_000, dashboard=True) as address:
            patch.setenv("RAY_ADDRESS", address)
            port = free_port()
            commands = [
                [sys.executable, "-c", WORK, str(tmp_path / "store"), str(REPOSITORY)],
                [sys.executable, "-m", "jobs.dashboards", "--prometheus-port", str(port)],
            ]
            with (tmp_path / "log").open("w") as log:
                running = [
                    subprocess.Popen(each, stdout=log, stderr=log, cwd=REPOSITORY, preexec_fn=heed_sigint)
                    for each in commands
                ]
                try:
                    yield f"http://127.0.0.1:{port}"
                finally:
                    running[1].send_signal(signal.SIGINT)
                    assert running[1].wait(60) == 0, (tmp_path / "log").read_text()
                    running[0].kill()
                    running[0].wait()


def series(address: str, query: str) -> int:
    """How many it finds now; 0 while the server does not answer."""
    try:
        with urlopen(f"{address}/api/v1/query?{urlencode({'query': query})}", timeout=10) as answer:
            found = json.load(answer)
    except OSError:
        return 0
    assert found["status"] == "success"
    return len(found["data"]["result"])


@pytest.mark.long
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus here (Debian: prometheus)")
def test_every_query_of_every_panel_finds_series(prometheus: str, tmp_path: Path) -> None:
    queries = {
        (name, panel["title"], target["expr"].replace("$run", "watched"))
        for name in BOARDS
        if name != ON_KUBERNETES
        for panel in board(name)["panels"]
        for target in panel["targets"]
    }
    assert len(queries) > 30
    missing, deadline = set(queries), time.monotonic() + PATIENCE_S
    while missing and time.monotonic() < deadline:
        missing = {each for each in missing if not series(prometheus, each[2])}
        time.sleep(1.0)
    log = (tmp_path / "log").read_text()
    assert missing == set(), log
    for name in ("training", "data"):  # the variable of the board offers the run
        metric = BOARDS[name][2]
        assert series(prometheus, f'count by (run, stage) ({metric}{{run="watched"}})') == 1
    boards = Path(log.partition("the boards wait in ")[2].split()[0]) if "the boards wait in" in log else None
    if boards is not None:
        assert {"training.json", "data.json", "train_grafana_dashboard.json"} <= set(os.listdir(boards))
