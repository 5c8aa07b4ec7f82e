"""trackio: a run of the project `tracking.project`, in a SQLite file on a disk or on a server of one's own (`trackio show`).

`trackio.log` queues, and what its thread cannot keep it tells in a warning and drops. Rows here go to the storage and the client
below it, as trackio's own importers write: they raise, and a row has an identity by which trackio takes it once, however often it
is sent. A server stamps rows with the time it got them.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from trackio import sqlite_storage
from trackio.remote_client import RemoteClient
from trackio.sqlite_storage import SQLiteStorage

from pipeline.config.schema import RunConfig
from pipeline.config.tracking import TrackingConfig
from pipeline.storage import Storage
from pipeline.tracking.tracker import RunName, folder_of

BATCH = 1000  # rows of a transaction, or of a request
TOKEN = "TRACKIO_WRITE_TOKEN"


class Row(NamedTuple):
    step: int
    time: float
    values: dict[str, float]


class Kept(Protocol):
    """Where a run's rows are."""

    def last_step(self) -> int: ...

    def write(self, rows: list[Row], settings: dict[str, Any] | None) -> None:
        """All of the rows or none. Raises what trackio raises."""


def check_settings(tracking: TrackingConfig) -> None:
    """Raises ValueError if a server is named and there is no token for it, or if trackio takes no such project."""
    if tracking.trackio_url is not None and not os.environ.get(TOKEN):
        raise ValueError(
            f"tracking.trackio_url: no credentials; set {TOKEN} to what `trackio show` prints behind write_token=, "
            "or leave the URL out for a file"
        )
    try:
        SQLiteStorage.validate_project_name(tracking.project)
    except ValueError as error:
        raise ValueError(f"tracking.project: {error}") from None


def open_run(config: RunConfig, storage: Storage, name: RunName) -> Trackio:
    check_settings(config.tracking)
    url = config.tracking.trackio_url
    kept = Folder(directory(config, storage), name) if url is None else Server(url, os.environ[TOKEN], name)
    return Trackio(config, kept)


def directory(config: RunConfig, storage: Storage) -> Path:
    """TRACKIO_DIR, which trackio's own commands read, too; else in the run's folder."""
    given = os.environ.get("TRACKIO_DIR")
    return Path(given) if given else folder_of(config, storage) / "trackio"


class Trackio:
    def __init__(self, config: RunConfig, kept: Kept) -> None:
        self._kept, self._rows = kept, list[Row]()
        self.last_step = kept.last_step()
        self._settings = {**config.model_dump(mode="json"), "_Group": config.run_id} if self.last_step == 0 else None

    def add(self, step: int, time: float, values: dict[str, float]) -> None:
        self._rows.append(Row(step, time, values))

    def flush(self) -> None:
        """What is not kept yet stays."""
        while self._rows:
            self._kept.write(self._rows[:BATCH], self._settings)
            self._settings = None
            del self._rows[:BATCH]

    def close(self) -> None:
        """Nothing is open between batches."""


class Folder:
    def __init__(self, folder: Path, name: RunName) -> None:
        self._name = name
        # trackio reads TRACKIO_DIR once, when it is imported; a Ray worker may track one run after another
        sqlite_storage.TRACKIO_DIR = folder

    def last_step(self) -> int:
        return SQLiteStorage.get_max_step_for_run(self._name.project, run_id=self._name.key) or 0

    def write(self, rows: list[Row], settings: dict[str, Any] | None) -> None:
        SQLiteStorage.bulk_log(
            project=self._name.project,
            run=self._name.name,
            run_id=self._name.key,
            metrics_list=[row.values for row in rows],
            steps=[row.step for row in rows],
            timestamps=[datetime.fromtimestamp(row.time, UTC).isoformat() for row in rows],
            log_ids=[identity(self._name, row) for row in rows],
            config=settings,
        )


class Server:
    def __init__(self, url: str, token: str, name: RunName) -> None:
        """Raises ConnectionError if nobody answers there."""
        self._name, self._client = name, RemoteClient(url, write_token=token)

    def last_step(self) -> int:
        found = self._client.predict(api_name="/get_run_summary", project=self._name.project, run_id=self._name.key)
        return int(found["last_step"] or 0)

    def write(self, rows: list[Row], settings: dict[str, Any] | None) -> None:
        entry = {"project": self._name.project, "run": self._name.name, "run_id": self._name.key}
        logs = [{**entry, "step": row.step, "metrics": row.values, "log_id": identity(self._name, row)} for row in rows]
        logs[0]["config"] = settings
        self._client.predict(api_name="/bulk_log", logs=logs, hf_token=None)


def identity(name: RunName, row: Row) -> str:
    return f"{name.key}-{row.step}"
