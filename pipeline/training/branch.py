"""A run that begins as another one was at a step: `training.start_from: RUN@STEP`.

It takes over the whole state of that checkpoint: weights, momentum, router biases and the guard's counters. With
`training.start_position: parent` also the position, so step numbers, data and schedule go on from there, and as long as mixture and
schedule are the parent's so do the losses, bit for bit: a cool-down, an anneal on another mixture or a longer run is the same
configuration with other stages after that position. With `zero` the position is 0: the run's own data and schedule from their beginning.

The first start says which checkpoint that is, by a conditional create, and every later one holds it against that,

    <root>/runs/<run_id>/start_from.json

Until the run has a checkpoint of its own it needs the parent's, and pins it there, in a way that the parent's retention knows
(retention.py) and that does not expire; its first commit takes the pin away. Whoever gives up a run that never got so far deletes the pin.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pipeline.config.load import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.integrity import read_record
from pipeline.manifest import CheckpointManifest, DamagedRecord, Record
from pipeline.optim.schedule import at_step, total_steps
from pipeline.storage import Storage
from pipeline.training.commits import RUN, committed_steps, incomplete, read_manifest, step_folder
from pipeline.training.identity import SKIPS, differences
from pipeline.training.left_out import LeftOut, left_out_path, union
from pipeline.training.retention import named_by, pins_folder

KEY = "training.start_from"
FOR_EVER = 10**11  # UNIX time of a pin that does not expire
MAY_DIFFER = {"model.initializer_range", "model.max_position_embeddings"}


class Origin(Record):
    """`<root>/runs/<run_id>/start_from.json`"""

    run_id: str
    step: int
    checkpoint_digest: str
    content_sha256: str
    next_sequence: int
    tokens_seen: int  # by the parent, up to there


def origin_path(run_id: str) -> str:
    return f"runs/{run_id}/start_from.json"


def origin_of(run_id: str, storage: Storage) -> Origin | None:
    """Where a run began that has begun and is a branch."""
    return read_record(storage, origin_path(run_id), Origin)


def split(start_from: str) -> tuple[str, int]:
    """(run, step) of `RUN@STEP`, which the schema has checked."""
    run, _, step = start_from.rpartition("@")
    return run, int(step)


def check(config: RunConfig, storage: Storage) -> CheckpointManifest:
    """The parent's checkpoint, if the run can begin there. Writes nothing.

    Raises ConfigError for one that is not there or damaged, another network, and a schedule that says something else of the position.
    """
    assert config.training.start_from is not None
    run, step = split(config.training.start_from)
    where = f"{KEY} {config.training.start_from}"
    try:
        parent = read_manifest(storage, run, step)
    except DamagedRecord as error:
        raise ConfigError(f"{where}: {error}") from None
    if parent is None:
        there = committed_steps(storage, run)
        raise ConfigError(
            f"{where}: run {run!r} has no checkpoint of step {step} in {storage.uri()}; it has {there or 'none'}"
        )
    if why := incomplete(storage, parent):
        raise ConfigError(f"{where}: {why}; take another step, of {committed_steps(storage, run)}")
    if found := _differences(config, storage, parent):
        raise ConfigError(f"{where}: the state does not fit: {'; '.join(found)}")
    if config.training.start_position == "parent":
        _check_position(config, parent, where)
    origin = origin_of(config.run_id, storage)
    if origin is not None and origin != _origin(parent):
        raise ConfigError(
            f"{where}: run {config.run_id!r} began at {origin.run_id}@{origin.step} with content "
            f"{origin.content_sha256[:16]}..., this checkpoint has {parent.content_sha256[:16]}...: take another run_id"
        )
    return parent


def begin(config: RunConfig, storage: Storage) -> CheckpointManifest:
    """The parent's checkpoint, pinned until `release`. Raises as `check` does."""
    assert config.training.start_from is not None
    run, step = split(config.training.start_from)
    storage.write(_pin(config.run_id, run, step), b"")  # before the look: from then on it stays
    try:
        parent = check(config, storage)
    except BaseException:
        release(config, storage)
        raise
    storage.create(origin_path(config.run_id), _origin(parent).to_json())
    if parent.left_out and config.training.start_position == "parent":  # its way through the data is ours up to here
        storage.create(left_out_path(config.run_id), LeftOut(inherited=parent.left_out).to_json())
    return check(config, storage)  # of two first starts one has said what the parent is


def first_sequence(config: RunConfig, storage: Storage) -> int:
    """Of the run's own data."""
    if config.training.start_from is None or config.training.start_position == "zero":
        return 0
    origin = origin_of(config.run_id, storage)
    return 0 if origin is None else origin.next_sequence


def first_step(config: RunConfig, storage: Storage) -> int:
    """After which the run's own steps begin."""
    if config.training.start_from is None or config.training.start_position == "zero":
        return 0
    origin = origin_of(config.run_id, storage)
    return 0 if origin is None else origin.step


def release(config: RunConfig, storage: Storage) -> None:
    """The run has a checkpoint of its own: the parent's may go."""
    assert config.training.start_from is not None
    storage.delete(_pin(config.run_id, *split(config.training.start_from)))


def _origin(parent: CheckpointManifest) -> Origin:
    return Origin(
        run_id=parent.run_id,
        step=parent.step,
        checkpoint_digest=parent.digest,
        content_sha256=parent.content_sha256,
        next_sequence=parent.next_sequence,
        tokens_seen=parent.tokens_seen,
    )


def _pin(child: str, run: str, step: int) -> str:
    return f"{pins_folder(run)}/{step:08d}-{FOR_EVER}-{hashlib.sha256(child.encode()).hexdigest()[:12]}"


def _differences(config: RunConfig, storage: Storage, parent: CheckpointManifest) -> list[str]:
    """What of the parent's settings, as its checkpoint has them, decides which tensors there are and what they mean."""
    data = storage.read_or_none(f"{step_folder(parent.run_id, parent.step)}/{RUN}")
    theirs: dict[str, Any] = json.loads(data) if data else {}
    ours = {f"model.{key}": value for key, value in config.model.model_dump(mode="json").items()}
    ours["optimizer.name"] = config.optimizer.name
    position = parent.next_sequence
    if config.training.start_position == "parent":
        ours["training.sequence_length"] = config.training.sequence_length
        ours[SKIPS] = [list(each) for each in config.training.skip_sequences]
        for begin, end in union([*map(tuple, theirs.get(SKIPS) or ()), *parent.left_out]):
            position += end - begin if position >= begin else 0
    common = ours.keys() & theirs.keys() - MAY_DIFFER
    return differences({key: ours[key] for key in common}, {key: theirs[key] for key in common}, position)


def _check_position(config: RunConfig, parent: CheckpointManifest, where: str) -> None:
    steps = total_steps(config.schedule, config.training.sequence_length)
    if parent.step >= steps:
        raise ConfigError(
            f"schedule.total_tokens {config.schedule.total_tokens:,}: the run ends at step {steps:,}, and {where} begins at "
            f"step {parent.step:,}; raise it, or set training.start_position=zero"
        )
    first = at_step(config.schedule, config.training.sequence_length, parent.step).first_sequence
    if first != parent.next_sequence:
        raise ConfigError(
            f"schedule.global_batch: by it step {parent.step:,} begins at sequence {first:,}, and the parent had come to "
            f"{parent.next_sequence:,}; keep the parent's stages up to there, or set training.start_position=zero"
        )
    early = {step: named for step, named in named_by(config).items() if step <= parent.step}
    for step, named in early.items():
        raise ConfigError(
            f"{named.setting}: the run begins at step {parent.step} and has no checkpoint of step {step}; {named.remedy}"
        )
