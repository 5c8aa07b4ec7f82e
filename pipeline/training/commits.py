"""Which checkpoints a run has, and whether this configuration may continue them.

A checkpoint is there if its manifest is (checkpoint.py writes it last), so that is answered by reading small files. No torch
in here: whoever only asks how far a run is, or starts the processes that compute, pays neither its memory nor its start.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pipeline.config.schema import RunConfig
from pipeline.dataset.order import Order
from pipeline.manifest import CheckpointManifest, DatasetManifest
from pipeline.storage import Storage
from pipeline.training.identity import differences, identity_digest, identity_of

MANIFEST = "manifest.json"
RUN = "run.json"


class ForeignCheckpoint(ValueError):
    """The run's folder holds checkpoints that this configuration would not have made."""


def train_folder(run_id: str) -> str:
    return f"runs/{run_id}/train"


def step_folder(run_id: str, step: int) -> str:
    return f"{train_folder(run_id)}/step-{step:08d}"


def committed(storage: Storage, run_id: str) -> list[CheckpointManifest]:
    """The checkpoints of a run that exist, oldest first."""
    folder = train_folder(run_id)
    paths = [info.path for info in storage.list(folder) if info.path.endswith(f"/{MANIFEST}")]
    return [
        CheckpointManifest.model_validate_json(storage.read(path))
        for path in paths
        if path.startswith(f"{folder}/step-")
    ]


@dataclass(frozen=True)
class RunFacts:
    """What every manifest of a run says about it."""

    run_id: str
    identity: dict[str, Any]
    dataset_digest: str
    order_digest: str

    @classmethod
    def of(cls, config: RunConfig, dataset: DatasetManifest, order: Order) -> RunFacts:
        return cls(config.run_id, identity_of(config, dataset.digest, order.describe()), dataset.digest, order.digest)


def continue_from(storage: Storage, facts: RunFacts, order: Order) -> CheckpointManifest | None:
    """The newest checkpoint of the run; None to start afresh.

    Raises ForeignCheckpoint, which names what differs, if the folder belongs to another run of the same name.
    """
    manifests = committed(storage, facts.run_id)
    if not manifests:
        return None
    newest = manifests[-1]
    if newest.run_identity == identity_digest(facts.identity):
        return newest
    folder = step_folder(newest.run_id, newest.step)
    theirs = json.loads(storage.read(f"{folder}/{RUN}"))
    position = int(order.positions(newest.next_sequence - 1)) + 1
    found = differences(facts.identity, theirs, position)
    if found:
        raise ForeignCheckpoint(
            f"run_id {newest.run_id!r} already has a checkpoint of a different run at {storage.uri(folder)}: "
            f"{'; '.join(found)}. Choose another run_id, undo the change, or delete "
            f"{storage.uri(train_folder(newest.run_id))}"
        )
    return newest
