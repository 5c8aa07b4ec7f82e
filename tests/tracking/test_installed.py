"""Weights & Biases, MLflow and trackio, each where its extra is installed: pip install '.[wandb]' and so on. `-rs` says which was not."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import RunConfig
from pipeline.storage import open_storage
from pipeline.tracking.follow import Sender
from pipeline.tracking.tracker import check, run_name
from tests.tracking.test_trackers import STEPS, Curves, after_a_crash, run_of, same, stored
from tests.training.make import Watched

pytestmark = pytest.mark.long


def extra(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"the extra {name} is not installed")


def crashed(root: Path, tracker: str) -> RunConfig:
    config = run_of(root, tracker)
    after_a_crash(config)
    return config


@extra("wandb")
def test_wandb_offline(tmp_path: Path) -> None:
    from pipeline.tracking.wandb import history

    config = crashed(tmp_path, "wandb")
    key = run_name(config, open_storage(config.storage)).key
    files = sorted((tmp_path / "runs/tiny/train/trackers/wandb").glob(f"offline-run-*-{key}/run-{key}.wandb"))
    assert len(files) == 2  # of one run, which `wandb sync` puts together
    found: Curves = defaultdict(dict)
    rows: Counter[int] = Counter()
    for file in files:
        for step, values in history(file):
            rows[step] += 1
            for name, value in values.items():
                found[name][step] = json.loads(value)
    assert rows == Counter(range(1, STEPS + 1))
    same(found, stored(tmp_path), rel=0)


@extra("mlflow")
def test_mlflow_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    crashed(tmp_path, "mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient((tmp_path / "runs/tiny/train/trackers/mlruns").as_uri())
    experiment = client.get_experiment_by_name("moonlight")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.data.params["model.hidden_size"]) == ("tiny", "16")
    found: Curves = {}
    for name, values in stored(tmp_path).items():
        history = client.get_metric_history(run.info.run_id, name)
        assert len(history) == len(values)  # no step twice
        found[name] = {metric.step: metric.value for metric in history}
    same(found, stored(tmp_path), rel=0)


SHOW = "import trackio; trackio.show(open_browser=False, server_port={port})"
LOGS = "import json; from trackio.sqlite_storage import SQLiteStorage; print(json.dumps(SQLiteStorage.get_logs('moonlight', 'tiny')))"


def in_trackio(folder: Path) -> Curves:
    """What a process that knows the folder alone reads with trackio. No step is there twice."""
    environment = os.environ | {"TRACKIO_DIR": str(folder)}
    logs = subprocess.run([sys.executable, "-c", LOGS], env=environment, capture_output=True, text=True, check=True)
    rows = json.loads(logs.stdout.splitlines()[-1])
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    found: Curves = defaultdict(dict)
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "timestamp"):
                found[name][row["step"]] = value
    return found


@extra("trackio")
def test_trackio_file(tmp_path: Path) -> None:
    """By its command line, too, which is what its users ask."""
    crashed(tmp_path, "trackio")
    folder = tmp_path / "runs/tiny/train/trackers/trackio"
    expected = stored(tmp_path)
    same(in_trackio(folder), expected, rel=0)

    def ask(*what: str) -> Any:
        command = [
            sys.executable,
            "-m",
            "trackio.cli",
            "get",
            *what,
            "--project",
            "moonlight",
            "--run",
            "tiny",
            "--json",
        ]
        environment = os.environ | {"TRACKIO_DIR": str(folder)}
        return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    values = ask("metric", "--metric", "train/loss")["values"]
    assert {each["step"]: each["value"] for each in values} == expected["train/loss"]
    run = ask("run")
    assert (run["last_step"], run["config"]["model"]["hidden_size"]) == (STEPS, 16)


@contextmanager
def trackio_server(folder: Path, port: int) -> Iterator[None]:
    """Its own server, in a process of its own, which answers."""
    environment = os.environ | {"TRACKIO_DIR": str(folder)}
    with subprocess.Popen(
        [sys.executable, "-u", "-c", SHOW.format(port=port)], env=environment, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        try:
            assert any("launched at" in line for line in server.stdout)
            yield
        finally:
            server.kill()


@extra("trackio")
def test_trackio_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A run goes on without one; it catches up when there is one; what arrives twice is there once."""
    monkeypatch.setenv("TRACKIO_WRITE_TOKEN", "secret")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = run_of(tmp_path, "trackio", trackio_url=f"http://127.0.0.1:{port}")
    Watched().train(config)
    storage = open_storage(config.storage)
    sender = Sender("trackio", config, storage)
    assert not sender.send()
    assert not sender.send()
    said = capsys.readouterr().err
    assert said.count("trackio does not get the run's records now (ConnectionError: ") == 2  # the run, and the sender
    with trackio_server(tmp_path / "server", port):
        assert sender.send()
        assert sender.sent == STEPS
        assert sender._tracker is not None
        sender._tracker.last_step = 3  # as if the server's answer had been lost
        assert sender.send()
        again = Sender("trackio", config, storage)
        assert again.send()
        assert again.sent == 0
    same(in_trackio(tmp_path / "server"), stored(tmp_path), rel=0)


@extra("trackio")
def test_trackio_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRACKIO_WRITE_TOKEN", raising=False)
    for tracking, message in (
        ({"trackio_url": "http://127.0.0.1:1"}, r"^tracking.trackio_url: no credentials; set TRACKIO_WRITE_TOKEN"),
        ({"project": "model_artifacts"}, "^tracking.project: .*model_artifacts.* is not allowed"),
    ):
        config = run_of(tmp_path, "trackio", **tracking)
        with pytest.raises(ValueError, match=message):
            check(config, open_storage(config.storage), here=True)
