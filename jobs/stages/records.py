"""What a run has: the records that its stages have left, and the version of its corpus that it holds on to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from data_prep import identity
from data_prep.identity import list_corpus
from data_prep.listing import Listing
from jobs.stages import questions
from pipeline.config.load import dump_yaml
from pipeline.config.schema import RunConfig
from pipeline.file_index import read_dataset
from pipeline.integrity import read_record
from pipeline.manifest import (
    CheckpointManifest,
    DatasetManifest,
    EvaluationManifest,
    ModelManifest,
    Record,
    TrainManifest,
)
from pipeline.storage import Storage
from pipeline.training.commits import train_folder


@dataclass
class Records:
    """The records of the stages that are done, by stage, up to the first one that is not."""

    of: dict[str, Record] = field(default_factory=dict)
    checkpoint: CheckpointManifest | None = None  # the one to evaluate and publish
    seen_by: str = "prepare"  # the stage that asks, see `held_dataset`
    listings: dict[str, Listing] = field(
        default_factory=dict, compare=False, repr=False
    )  # once somebody has asked for them

    def done(self, stage: str) -> bool:
        return stage in self.of

    def corpus(self, config: RunConfig) -> dict[str, Listing]:
        """The files of every source: listed when somebody asks for the first time, the same for all who ask later. Raises ConfigError."""
        self.listings = self.listings or list_corpus(config)
        return self.listings

    @property
    def dataset(self) -> DatasetManifest | None:
        return cast(DatasetManifest | None, self.of.get("prepare"))

    @property
    def train(self) -> TrainManifest | None:
        return cast(TrainManifest | None, self.of.get("train"))

    @property
    def evaluation(self) -> EvaluationManifest | None:
        return cast(EvaluationManifest | None, self.of.get("evaluate"))

    @property
    def model(self) -> ModelManifest | None:
        return cast(ModelManifest | None, self.of.get("publish"))


def dataset_identity(config: RunConfig, storage: Storage, listings: Mapping[str, Listing] | None = None) -> str:
    """The name of the dataset of this configuration, with the questions that the run has asked for, and the corpus as it is now. Raises
    ConfigError."""
    return identity.identity(questions.pinned(config, storage), list_corpus(config) if listings is None else listings)


def settings_digest(config: RunConfig, storage: Storage) -> str:
    """Of what the configuration says of the dataset, whatever files are in the corpus and whichever code and libraries read them."""
    return identity.settings_digest(questions.pinned(config, storage))


def _has_settings_of(held: HeldDataset, config: RunConfig, storage: Storage) -> bool:
    """Records of before hold the name that an empty corpus would have, versions of libraries in it."""
    if held.settings in (settings_digest(config, storage), dataset_identity(config, storage, {})):
        return True
    return held.settings == identity.settings_said_before(questions.pinned(config, storage))


class HeldDataset(Record):
    """`<root>/runs/<run_id>/dataset.json`: which version of its corpus a run works on."""

    dataset: str  # identity
    settings: str  # digest of the settings it was made with: with others it is not this run's dataset


def held_path(run_id: str) -> str:
    return f"runs/{run_id}/dataset.json"


def held_dataset(config: RunConfig, storage: Storage, stage: str = "prepare") -> str | None:
    """The dataset that the run holds on to; None if it takes the corpus as it is now.

    A corpus may grow at any time, also while a run waits for its GPUs or trains for weeks. So prepare follows the corpus until
    training has begun; the stages after it use what prepare left, and from the first step on so does the whole run. New files
    are for the next run.
    """
    held = read_record(storage, held_path(config.run_id), HeldDataset)
    if held is None or not _has_settings_of(held, config, storage):
        return None
    if stage == "prepare" and not storage.names(train_folder(config.run_id)):
        return None
    return held.dataset


def hold_dataset(config: RunConfig, storage: Storage, dataset: DatasetManifest | None) -> None:
    """Hold on to the dataset that was found, if one was."""
    if dataset is not None:
        held = HeldDataset(dataset=dataset.identity, settings=settings_digest(config, storage)).to_json()
        if storage.read_or_none(held_path(config.run_id)) != held:
            storage.write(held_path(config.run_id), held)


def settings_path(run_id: str) -> str:
    return f"runs/{run_id}/config.yaml"


def keep_settings(config: RunConfig, storage: Storage) -> None:
    """The run's own copy of its configuration: what its stages and its page go by."""
    data, path = dump_yaml(config).encode(), settings_path(config.run_id)
    if storage.read_or_none(path) != data:
        storage.write(path, data)


def open_dataset(config: RunConfig, storage: Storage, name: str | None = None) -> DatasetManifest:
    """The committed dataset `name`, by default the run's: what its prepare left, else what the corpus stands for now.

    Raises ValueError if there is none.
    """
    found = name or held_dataset(config, storage, "train") or dataset_identity(config, storage)
    try:
        return read_dataset(storage, found)
    except FileNotFoundError:
        others = sorted(
            entry.path.split("/")[1] for entry in storage.list("datasets") if entry.path.endswith("/dataset.json")
        )
        raise ValueError(
            f"no dataset {found} in {storage.uri()}; there are: {', '.join(others) or 'none'}; "
            "prepare it, or name one with --dataset"
        ) from None
