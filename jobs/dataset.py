"""Which dataset a command means: the one that the run holds on to, the corpus as it is now, or one named by its identity."""

from __future__ import annotations

from data_prep.prepare import identity
from data_prep.records import dataset_path
from jobs.stages import held_dataset
from pipeline.config.schema import RunConfig
from pipeline.manifest import DatasetManifest
from pipeline.storage import Storage


def open_dataset(config: RunConfig, storage: Storage, name: str | None = None) -> DatasetManifest:
    """The committed dataset `name`, by default the run's: what its prepare left, else what the corpus stands for now."""
    found = name or held_dataset(config, storage, "train") or identity(config, storage)
    data = storage.read_or_none(dataset_path(found))
    if data is None:
        others = sorted(
            entry.path.split("/")[1] for entry in storage.list("datasets") if entry.path.endswith("/dataset.json")
        )
        raise ValueError(
            f"no dataset {found} in {storage.uri()}; there are: {', '.join(others) or 'none'}; "
            "prepare it, or name one with --dataset"
        )
    return DatasetManifest.model_validate_json(data)
