"""Train: the network on the prepared dataset, from the newest checkpoint if there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jobs.on_ray.gauges import SCORES, TRAINING
from jobs.stages.disk import check_room
from jobs.stages.records import HeldDataset, Records, held_path
from pipeline.config.load import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.file_index import read_dataset
from pipeline.integrity import read_record
from pipeline.manifest import CheckpointManifest, TrainManifest
from pipeline.optim.schedule import total_steps
from pipeline.planner.preparing import checkpoint_bytes, checkpoints_kept, mean_bytes, model_bytes
from pipeline.storage import Storage, filesystem
from pipeline.tracking import tracker
from pipeline.training import branch, initial, profiles
from pipeline.training.commits import committed, committed_steps, find_average, read_manifest, train_folder
from pipeline.training.identity import run_identity
from pipeline.training.metrics import TrainProgress
from pipeline.training.retention import averaged_steps, check_named
from pipeline.workflow.record import StageProgress

NAME = "train"
SUMMARY = "Train the model on the prepared dataset, from the newest checkpoint if there is one."
GAUGES = TRAINING | SCORES


def find(config: RunConfig, storage: Storage, records: Records) -> TrainManifest | None:
    """Also sets the checkpoint that the later stages are about; none while it is a mean that is not made. Raises ConfigError if the one asked for is not there."""
    assert records.dataset is not None
    train = _complete(config, storage)
    if train is None or train.identity != run_identity(config, records.dataset):
        return None
    records.checkpoint = _chosen_checkpoint(config, train, storage)
    return train


def check(config: RunConfig, storage: Storage, records: Records, *, here: bool) -> None:
    """The checkpoint that will be asked for must be one that the run makes. Training starts from the weights that the run
    has pinned; later the weights are in the checkpoints."""
    check_named(config, storage)
    tracker.check(config, storage, here=here)
    profiles.check(config, storage)
    if total_steps(config.schedule, config.training.sequence_length) < 1:
        raise ConfigError(
            f"schedule.total_tokens {config.schedule.total_tokens:,} is less than one step of global_batch; raise it"
        )
    _refuse_missing_weights(config, storage, here)
    kept = checkpoints_kept(config) + 1  # one more while the oldest is retired
    missing = kept - len(committed_steps(storage, config.run_id))
    wanted = checkpoint_bytes(config) * max(1, missing) + mean_bytes(config) + model_bytes(config)
    less = "lower checkpoint.keep" + (" or evaluation.waiting" if config.evaluation.follow else "")
    check_room(storage, wanted, "checkpoints and the published model", less)
    if committed(storage, config.run_id):
        return
    if records.dataset is not None:
        initial.check(config, storage, records.dataset.tokenizer.sha256)
    if config.training.start_from:
        branch.check(config, storage)
        _refuse_other_tokenizer(config, storage, records)


def do(config: RunConfig, storage: Storage, records: Records, report: Callable[[TrainProgress], None]) -> None:
    from jobs.on_ray.train import train_with_ray  # here: it brings torch, 150 MB a process

    assert records.dataset is not None
    train_with_ray(config, records.dataset, storage, report)


def progress() -> Callable[[TrainProgress], StageProgress]:
    return _progress


def _progress(at: TrainProgress) -> StageProgress:
    return StageProgress(
        NAME, at.step, at.steps, "steps", at.tokens_per_second, "tokens", at.eta_s, f"loss {at.loss:.4f}"
    )


def chosen_checkpoint(config: RunConfig, storage: Storage) -> CheckpointManifest | None:
    """The one that `evaluation.checkpoint` or `publishing.average_last` means, None before it is there. Raises ConfigError if it is not there."""
    train = _complete(config, storage)
    return None if train is None else _chosen_checkpoint(config, train, storage)


def _complete(config: RunConfig, storage: Storage) -> TrainManifest | None:
    return read_record(storage, f"{train_folder(config.run_id)}/manifest.json", TrainManifest)


def _refuse_missing_weights(config: RunConfig, storage: Storage, here: bool) -> None:
    """Of a folder elsewhere. What is in it only the loading knows."""
    weights = config.training.initial_weights
    if weights is None or weights in initial.QUESTIONS:
        return
    path = initial.split(weights)[0]
    if not (path.startswith("s3://") or Path(path).is_absolute()):
        if not storage.exists(path):
            raise ConfigError(
                f"{initial.KEY} {weights}: nothing is at {storage.uri(path)}; give a folder, s3:// URI or published version"
            )
    elif here and not filesystem(path, config.storage).exists(path.removeprefix("s3://")):
        raise ConfigError(f"{initial.KEY} {weights}: there is no such folder; give one with a Hugging Face model")


def _refuse_other_tokenizer(config: RunConfig, storage: Storage, records: Records) -> None:
    """A branch goes on with the parent's tokens. Of a parent whose dataset is gone nobody knows."""
    assert config.training.start_from is not None
    parent, _ = branch.split(config.training.start_from)
    held = read_record(storage, held_path(parent), HeldDataset)
    if held is None or records.dataset is None:
        return
    try:
        theirs = read_dataset(storage, held.dataset).tokenizer
    except FileNotFoundError:
        return
    if theirs.sha256 != records.dataset.tokenizer.sha256:
        raise ConfigError(
            f"{branch.KEY} {config.training.start_from}: the corpus is tokenized with {records.dataset.tokenizer.sha256[:16]}..., "
            f"the parent's with {theirs.sha256[:16]}...; set tokenizer.path to {storage.uri(theirs.folder)}"
        )


def _chosen_checkpoint(config: RunConfig, train: TrainManifest, storage: Storage) -> CheckpointManifest | None:
    averaged = averaged_steps(config)
    if averaged:
        return find_average(storage, config.run_id, averaged)
    wanted = config.evaluation.checkpoint
    if wanted == "last" or wanted == train.checkpoint.step:
        return train.checkpoint
    found = read_manifest(storage, config.run_id, wanted)
    if found is None:
        there = committed_steps(storage, config.run_id)
        raise ConfigError(f"evaluation.checkpoint {wanted}: no such checkpoint; there are {there}")
    return found
