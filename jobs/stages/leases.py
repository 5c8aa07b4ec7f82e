"""Which stages of a run one process does at a time, and by which lease (pipeline/lease.py).

    prepare     datasets/<identity>/writer.json     the dataset, whichever runs use it
    train       runs/<run_id>/train/writer.json
    publish     runs/<run_id>/publish/writer.json

evaluate holds none: of two results of the same inputs the first one counts, for both.
"""

from __future__ import annotations

from data_prep import records as data_records
from jobs.stages.records import dataset_identity, held_dataset
from pipeline.config.schema import RunConfig
from pipeline.lease import LeaseRecord, give_way
from pipeline.lease import refuse_held as refuse
from pipeline.publishing import version
from pipeline.storage import Storage
from pipeline.training import commits

LEASED = ("prepare", "train", "publish")


def refuse_held(stage: str, config: RunConfig, storage: Storage) -> None:
    """Raises Held if somebody does this stage just now, before a Ray is started for it. prepare itself asks once it has listed the
    corpus, which may take as long as starting Ray does."""
    if stage in LEASED and stage != "prepare":
        refuse(storage, *_lease(stage, config, storage))


def release(stage: str, config: RunConfig, storage: Storage) -> LeaseRecord | None:
    """Whoever does this stage, alive or not, writes no more; who that was. Raises ConfigError where a corpus cannot be listed."""
    return give_way(storage, _lease(stage, config, storage)[0])


def _lease(stage: str, config: RunConfig, storage: Storage) -> tuple[str, str]:
    """Its path, and what it protects, as messages name it."""
    if stage == "prepare":
        dataset = held_dataset(config, storage) or dataset_identity(config, storage)
        return data_records.lease_path(dataset), f"dataset {dataset[:8]}"
    if stage == "train":
        return commits.lease_path(config.run_id), f"run {config.run_id}"
    return version.lease_path(config.run_id), f"the model of run {config.run_id}"
