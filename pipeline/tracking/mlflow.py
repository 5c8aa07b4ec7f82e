"""MLflow: a run of the experiment `tracking.project`, on a tracking server or in files.

Runs are found again by a tag. Metrics go in batches with their steps and times. MLflow keeps its file store for those who ask for it
only, so where the folder is meant it is asked for.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric, Param

from pipeline.config.schema import RunConfig
from pipeline.storage import Storage
from pipeline.tracking.names import NAMES
from pipeline.tracking.tracker import RunName, folder_of

TAG = "moonlight.run"
BATCH = 1000  # metrics of a request, and 100 settings: MLflow's limits
SETTINGS = 100
LONGEST = 500  # characters of a setting


def open_run(config: RunConfig, storage: Storage, name: RunName) -> MLflow:
    uri = config.tracking.mlflow_uri
    if uri is None and not mlflow.is_tracking_uri_set():
        uri = (folder_of(config, storage) / "mlruns").as_uri()
    if uri is not None and uri.startswith("file:"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        Path(uri.removeprefix("file://")).mkdir(parents=True, exist_ok=True)
    return MLflow(config, mlflow.MlflowClient(tracking_uri=uri), name)


class MLflow:
    def __init__(self, config: RunConfig, client: Any, name: RunName) -> None:
        self._client = client
        self._metrics: list[Metric] = []
        experiment = client.get_experiment_by_name(name.project)
        where = experiment.experiment_id if experiment is not None else client.create_experiment(name.project)
        found = client.search_runs([where], filter_string=f"tags.`{TAG}` = '{name.key}'", max_results=1)
        if found:
            self._run_id = found[0].info.run_id
        else:
            tags = {TAG: name.key, "moonlight.run_id": config.run_id}
            self._run_id = client.create_run(where, run_name=name.name, tags=tags).info.run_id
            self._put_settings(config)
        self.last_step = max(
            (m.step for m in client.get_metric_history(self._run_id, NAMES["learning_rate"])), default=0
        )

    def add(self, step: int, time: float, values: dict[str, float]) -> None:
        self._metrics += [Metric(key, value, int(time * 1000), step) for key, value in values.items()]

    def flush(self) -> None:
        """What is not sent yet stays; a step whose learning rate arrived has arrived whole, because it is sent last."""
        last = NAMES["learning_rate"]
        self._metrics.sort(key=lambda metric: (metric.step, metric.key == last))
        while self._metrics:
            self._client.log_batch(self._run_id, metrics=self._metrics[:BATCH])
            del self._metrics[:BATCH]

    def close(self) -> None:
        """Nothing is open between requests."""

    def _put_settings(self, config: RunConfig) -> None:
        flat = [Param(key, value[:LONGEST]) for key, value in flatten(config.model_dump(mode="json"))]
        for at in range(0, len(flat), SETTINGS):
            self._client.log_batch(self._run_id, params=flat[at : at + SETTINGS])


def flatten(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    """`model.hidden_size`, "2048"; lists as they are printed."""
    if not isinstance(values, dict):
        return [(prefix, str(values))]
    return [pair for key, value in values.items() for pair in flatten(value, f"{prefix}.{key}" if prefix else key)]
