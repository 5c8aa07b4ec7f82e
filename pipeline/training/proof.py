"""Proof that a committed checkpoint is what was saved: its record, every file's length, every piece's bytes.

Reads each byte once, in blocks, without a network or a process group. What is wrong is reported, not raised."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.manifest import DamagedRecord
from pipeline.storage import Storage
from pipeline.training.commits import incomplete, read_manifest, step_folder
from pipeline.training.files import CheckpointReader


@dataclass(frozen=True)
class CheckpointReport:
    step: int
    bytes: int
    damage: tuple[str, ...]


def check_checkpoint(storage: Storage, run_id: str, step: int) -> CheckpointReport:
    """Of a step that has none: what a load would say."""
    try:
        manifest = read_manifest(storage, run_id, step)
    except DamagedRecord as error:
        return CheckpointReport(step, 0, (str(error),))
    folder = step_folder(run_id, step)
    if manifest is None:
        return CheckpointReport(step, 0, (f"{storage.uri(folder)}: no checkpoint is committed there",))
    why = incomplete(storage, manifest)
    size, damage = 0, [why] if why else []
    try:
        for path, count, what in CheckpointReader(storage, manifest).verify():
            size += count
            if what and not (why and path in why):  # a file that is missing is named once
                damage.append(what)
    except ValueError as error:  # damage, or another version's format
        damage.append(str(error))
    return CheckpointReport(step, size, tuple(dict.fromkeys(damage)))
