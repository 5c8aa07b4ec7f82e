"""Weights & Biases and MLflow, each where its extra is installed: pip install '.[wandb]' or '.[mlflow]'. `-rs` says which was not."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from pipeline.config.schema import RunConfig
from pipeline.storage import open_storage
from pipeline.tracking.tracker import run_name
from tests.tracking.test_trackers import STEPS, Curves, after_a_crash, run_of, same, stored

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
