"""Which checkpoints a run has, and whether this configuration may continue them.

A checkpoint is there if its manifest is (`commit` writes it last), so that is answered by listing one folder and reading
small files, few of them however many checkpoints there are. No torch in here: whoever only asks how far a run is, or starts
the processes that compute, pays neither its memory nor its start.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, overload

from pipeline.config.schema import RunConfig
from pipeline.dataset.order import Order
from pipeline.integrity import read_record
from pipeline.manifest import CheckpointManifest, DamagedRecord, DatasetManifest
from pipeline.storage import Storage
from pipeline.training.identity import differences, identity_digest, identity_of

MANIFEST = "manifest.json"
RUN = "run.json"
WITHDRAWN = "manifest.withdrawn.json"  # of a checkpoint that was found damaged and passed over


class ForeignCheckpoint(ValueError):
    """The run's folder holds checkpoints that this configuration would not have made."""


class DamagedCheckpoint(ValueError):
    """Stored bytes of a checkpoint are not those that were written; names the file, and the tensor where there is one."""


class NoSoundCheckpoint(ValueError):
    """The run has checkpoints and all of them are damaged; the message names what is wrong with each."""


def train_folder(run_id: str) -> str:
    return f"runs/{run_id}/train"


def lease_path(run_id: str) -> str:
    """Of the record that says who trains the run (writer.py)."""
    return f"{train_folder(run_id)}/writer.json"


def step_folder(run_id: str, step: int) -> str:
    return f"{train_folder(run_id)}/step-{step:08d}"


def manifest_path(run_id: str, step: int) -> str:
    return f"{step_folder(run_id, step)}/{MANIFEST}"


def parts_folder(run_id: str, step: int, fence: int | None) -> str:
    """Where the writer with this fencing number puts a checkpoint's parts: no two writers share one."""
    return f"{step_folder(run_id, step)}/writer-{fence or 0}"


def average_folder(run_id: str, step: int, count: int) -> str:
    """Of the mean of the last `count` scheduled checkpoints up to a step (average.py)."""
    return f"runs/{run_id}/average/step-{step:08d}-last-{count}"


def folder_of(manifest: CheckpointManifest) -> str:
    """Where a checkpoint lies, or the mean of several."""
    if manifest.average_of:
        return average_folder(manifest.run_id, manifest.step, len(manifest.average_of))
    return step_folder(manifest.run_id, manifest.step)


def parts_of(manifest: CheckpointManifest) -> str:
    """Where its pieces are."""
    return f"{folder_of(manifest)}/writer-{manifest.fence or 0}"


def step_folders(storage: Storage, run_id: str) -> list[int]:
    """Steps that have a folder, ascending; whether it holds a committed checkpoint only its manifest says."""
    names = storage.names(train_folder(run_id))
    return sorted(int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdecimal())


def read_manifest(storage: Storage, run_id: str, step: int) -> CheckpointManifest | None:
    """None if the step has no committed checkpoint. Raises DamagedRecord."""
    return read_record(storage, manifest_path(run_id, step), CheckpointManifest)


def read_average(storage: Storage, run_id: str, step: int, count: int) -> CheckpointManifest | None:
    """The mean of `count` checkpoints up to a step that was made last, None before. Raises DamagedRecord."""
    return read_record(storage, f"{average_folder(run_id, step, count)}/{MANIFEST}", CheckpointManifest)


def find_average(storage: Storage, run_id: str, steps: tuple[int, ...]) -> CheckpointManifest | None:
    """The mean of the checkpoints of these steps, None before it is made. One of others is none, although it has the name: of other steps,
    as `checkpoint.every_steps` may change, or of a run that was trained again since. Costs a read a step. Raises DamagedRecord."""
    found = read_average(storage, run_id, steps[-1], len(steps))
    if found is None or found.average_of != steps or len(found.average_content) != len(steps):
        return None
    there = [read_manifest(storage, run_id, step) for step in steps]  # one that is gone contradicts nothing
    same = (each is None or each.content_sha256 == was for each, was in zip(there, found.average_content))
    return found if all(same) else None


def commit(storage: Storage, manifest: CheckpointManifest) -> None:
    """Make the checkpoint exist, once all of its files do. One of an earlier writer gives way. Raises ValueError if a writer
    with this fencing number or a later one has committed another checkpoint."""
    path = manifest_path(manifest.run_id, manifest.step)
    while not storage.create(path, manifest.to_json()):
        etag = storage.etag(path)
        data = storage.read_or_none(path)
        if data is None:
            continue
        other = CheckpointManifest.parse(data, storage.uri(path))
        if other == manifest:  # the storage's answer was lost
            return
        if (other.fence or 0) >= (manifest.fence or 0):
            raise ValueError(f"{storage.uri(path)}: another writer has committed this step; is the run trained twice?")
        if storage.swap(path, manifest.to_json(), etag):
            return


class Committed(Sequence[CheckpointManifest]):
    """The checkpoints of a run that exist, oldest first. Manifests are read when they are asked for; one that is torn
    raises DamagedRecord."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        self._storage, self._run_id = storage, run_id
        self._steps = step_folders(storage, run_id)

    def __len__(self) -> int:
        return sum(self._storage.exists(manifest_path(self._run_id, step)) for step in self._steps)

    def __bool__(self) -> bool:
        return any(self._storage.exists(manifest_path(self._run_id, step)) for step in reversed(self._steps))

    def __iter__(self) -> Iterator[CheckpointManifest]:
        return self._read(self._steps)

    def __reversed__(self) -> Iterator[CheckpointManifest]:
        return self._read(self._steps[::-1])

    @overload
    def __getitem__(self, index: int) -> CheckpointManifest: ...
    @overload
    def __getitem__(self, index: slice) -> list[CheckpointManifest]: ...
    def __getitem__(self, index: int | slice) -> CheckpointManifest | list[CheckpointManifest]:
        if isinstance(index, slice):
            return list(self)[index]
        found = iter(self) if index >= 0 else reversed(self)
        for number, manifest in enumerate(found, start=0 if index >= 0 else 1):
            if number == abs(index):
                return manifest
        raise IndexError(index)

    def _read(self, steps: list[int]) -> Iterator[CheckpointManifest]:
        for step in steps:
            manifest = read_manifest(self._storage, self._run_id, step)
            if manifest is not None:
                yield manifest


def committed(storage: Storage, run_id: str) -> Committed:
    """The checkpoints of a run that exist, oldest first; costs one listing until they are looked at."""
    return Committed(storage, run_id)


def committed_steps(storage: Storage, run_id: str) -> list[int]:
    """Their steps, ascending; asks for each folder whether it holds a manifest."""
    steps = step_folders(storage, run_id)
    with ThreadPoolExecutor(16) as threads:  # on S3 each is a request
        there = threads.map(lambda step: storage.exists(manifest_path(run_id, step)), steps)
        return [step for step, exists in zip(steps, there) if exists]


@dataclass(frozen=True)
class RunFacts:
    """What every manifest of a run says about it."""

    run_id: str
    identity: dict[str, Any]
    dataset_digest: str
    order_digest: str
    fence: int | None = None  # of the lease under which this process writes

    @classmethod
    def of(cls, config: RunConfig, dataset: DatasetManifest, order: Order) -> RunFacts:
        return cls(config.run_id, identity_of(config, dataset.digest, order.describe()), dataset.digest, order.digest)


def continue_from(
    storage: Storage,
    facts: RunFacts,
    order: Order,
    *,
    below: int | None = None,
    passed_over: Callable[[int, str], None] = lambda step, why: None,
) -> CheckpointManifest | None:
    """The newest checkpoint of the run whose files are all there in full length (of a step before `below`, if given); None
    to start afresh. `passed_over(step, why)` is told of each that is damaged; of contents only a load knows.

    Raises ForeignCheckpoint, which names what differs, if the folder belongs to another run of the same name, and
    NoSoundCheckpoint if there are checkpoints and each is damaged.
    """
    damaged: list[str] = []
    for step in reversed(step_folders(storage, facts.run_id)):
        if below is not None and step >= below:
            continue
        try:
            found = read_manifest(storage, facts.run_id, step)
            why = "" if found is None else incomplete(storage, found)
        except DamagedRecord as error:
            found, why = None, str(error)
        if why:
            damaged.append(why)
            passed_over(step, why)
        elif found is not None:
            refuse_foreign(storage, facts, order, found)
            return found
    if damaged:
        raise NoSoundCheckpoint(
            f"run {facts.run_id!r} has no sound checkpoint: {'; '.join(damaged)}. Restore one from a copy, or delete "
            f"{storage.uri(train_folder(facts.run_id))} to train from the beginning"
        )
    return None


def incomplete(storage: Storage, manifest: CheckpointManifest) -> str:
    """Which of its files is missing or of another length; '' if none is."""
    there = {info.path: info.bytes for info in storage.list(step_folder(manifest.run_id, manifest.step))}
    for file in manifest.files:
        if file.path not in there:
            return f"{storage.uri(file.path)}: the file is missing"
        if there[file.path] != file.bytes:
            return f"{storage.uri(file.path)}: {there[file.path]} bytes, {file.bytes} were written"
    return ""


def refuse_foreign(storage: Storage, facts: RunFacts, order: Order, newest: CheckpointManifest) -> None:
    """Raises ForeignCheckpoint, which names what differs, for a checkpoint that this configuration would not have made."""
    if newest.run_identity == identity_digest(facts.identity):
        return
    folder = step_folder(newest.run_id, newest.step)
    found = ["its settings are others"]
    data = storage.read_or_none(f"{folder}/{RUN}")
    try:
        theirs = json.loads(data or b"null")
    except ValueError:
        theirs = None
    if theirs is not None and identity_digest(theirs) == newest.run_identity:  # else the explanation itself is damaged
        found = differences(facts.identity, theirs, int(order.positions(newest.next_sequence - 1)) + 1)
    if found:
        raise ForeignCheckpoint(
            f"run_id {newest.run_id!r} already has a checkpoint of a different run at {storage.uri(folder)}: "
            f"{'; '.join(found)}. Choose another run_id, undo the change, or delete "
            f"{storage.uri(train_folder(newest.run_id))}"
        )
