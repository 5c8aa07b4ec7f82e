"""Which dataset a command means: the one of the configuration, or one named by its identity."""

from __future__ import annotations

from data_prep.prepare import identity
from data_prep.records import dataset_path
from pipeline.config.schema import RunConfig
from pipeline.manifest import DatasetManifest
from pipeline.storage import Storage


def open_dataset(config: RunConfig, storage: Storage, name: str | None = None) -> DatasetManifest:
    """The committed dataset `name`, by default the one that the corpus and settings of `config` stand for now."""
    found = name or identity(config, storage)
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
