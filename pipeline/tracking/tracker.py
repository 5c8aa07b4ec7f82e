"""What a tracker answers, and how one is opened."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.config.schema import RunConfig
from pipeline.config.tracking import TrackingConfig
from pipeline.manifest import digest_of
from pipeline.storage import Storage
from pipeline.training.commits import train_folder
from pipeline.training.left_out import read_left_out

MODULES = {
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
}  # what has to be there


class Tracker(Protocol):
    """Open for one run, whose earlier records it may have."""

    last_step: int  # the newest step that it has, 0 without any

    def add(self, step: int, time: float, values: dict[str, float]) -> None:
        """Steps come in order. `time`: UNIX, when the step was logged."""

    def flush(self) -> None:
        """Raises whatever the tracker's client raises if it cannot keep what was added."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class RunName:
    """How a run is called there."""

    project: str
    name: str
    key: str  # of this run alone, whatever other storage has a run of that name


def run_name(config: RunConfig, storage: Storage, gone_back: int | None = None) -> RunName:
    """A run that went back on a spike goes on under a name of its own: trackers cannot unwrite steps. `gone_back`: how often, for
    the records at hand; None: as often as it has by now."""
    ways = 1 + (len(read_left_out(storage, config.run_id).detours) if gone_back is None else gone_back)
    name = config.run_id if ways == 1 else f"{config.run_id}-way-{ways}"
    return RunName(config.tracking.project, name, f"{name}-{digest_of(storage.root)[:8]}")


def folder_of(config: RunConfig, storage: Storage) -> Path:
    """On a disk. Raises ValueError where there is none."""
    if config.tracking.folder is not None:
        return Path(config.tracking.folder) / config.run_id
    if config.storage.is_s3:
        raise ValueError(
            f"tracking.folder: {', '.join(config.tracking.trackers)} may write to a disk, and storage.root is on S3; give a folder that "
            "rank 0 always finds, like a mounted volume"
        )
    return Path(storage.uri(f"{train_folder(config.run_id)}/trackers"))


def check(config: RunConfig, storage: Storage, *, here: bool) -> None:
    """What can be wrong with trackers before a run. Raises ValueError. `here`: the run will run where this is asked."""
    for name in config.tracking.trackers:
        if _may_write_to_a_disk(name, config.tracking):
            folder_of(config, storage)
        if not here:
            continue
        if importlib.util.find_spec(MODULES[name]) is None:
            raise ValueError(
                f"tracking.trackers: {name} is not installed; pip install 'moonlight-pipeline[{name}]', or leave it out"
            )
        if name == "wandb" and not config.tracking.offline:
            importlib.import_module("pipeline.tracking.wandb").check_credentials()
        if name == "trackio":
            importlib.import_module("pipeline.tracking.trackio").check_settings(config.tracking)


def _may_write_to_a_disk(name: str, tracking: TrackingConfig) -> bool:
    """Where the environment decides, it may."""
    match name:
        case "mlflow":
            return tracking.mlflow_uri is None
        case "trackio":
            return tracking.trackio_url is None
    return name == "wandb"


def open_tracker(name: str, config: RunConfig, storage: Storage, run: RunName) -> Tracker:
    """Raises whatever the tracker's client raises, and ImportError where it is not installed."""
    module: Any = importlib.import_module(f"pipeline.tracking.{name}")
    opened: Tracker = module.open_run(config, storage, run)
    return opened
