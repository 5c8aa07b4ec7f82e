"""Settings of experiment trackers: where a run's records go besides its own storage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from pipeline.config.section import Section
from pipeline.config.values import Endpoint, Location

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class TrackingConfig(Section):
    """Nothing here changes what a run computes; what a tracker lacks it gets from the run's records, whenever it is added."""

    trackers: tuple[Tracker, ...] = ()
    project: Annotated[str, Field(min_length=1, max_length=100)] = "moonlight"  # W&B's, trackio's, MLflow's experiment
    entity: str | None = None  # W&B's; None: the user's default
    offline: bool = False  # W&B: write to the folder only, for `wandb sync`
    mlflow_uri: str | None = None  # None: MLFLOW_TRACKING_URI, else files in the folder
    trackio_url: Endpoint | None = None  # of a server; None: a SQLite file in TRACKIO_DIR, else in the folder
    folder: Location | None = (
        None  # on a disk, for what trackers write there; None: in the run, if its storage is a folder
    )

    @field_validator("folder")
    @classmethod
    def _on_a_disk(cls, folder: str | None) -> str | None:
        if folder is not None and folder.startswith("s3://"):
            raise ValueError(f"{folder}: trackers write to a disk; give a folder")
        return folder

    @field_validator("trackio_url")
    @classmethod
    def _without_a_token(cls, url: str | None) -> str | None:
        if url is not None and "write_token=" in url:  # settings are stored, shown and published
            raise ValueError("holds a token; set TRACKIO_WRITE_TOKEN to it and leave it out of the URL")
        return url

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, trackers: tuple[Tracker, ...]) -> tuple[Tracker, ...]:
        if len(set(trackers)) < len(trackers):
            raise ValueError(f"{list(trackers)}: name each tracker once")
        return trackers
