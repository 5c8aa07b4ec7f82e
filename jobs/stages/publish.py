"""Publish: the evaluated checkpoint as a Hugging Face folder, promoted unless a gate is closed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from jobs.commit import git_commit
from jobs.stages.records import Records
from jobs.stages.train import chosen_checkpoint
from pipeline.config.load import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.evaluation.result import manifest_path
from pipeline.integrity import read_record
from pipeline.manifest import DamagedRecord, EvaluationManifest, ModelManifest
from pipeline.publishing import registry, targets
from pipeline.publishing.gate import refusal
from pipeline.publishing.version import PublishProgress, version_name
from pipeline.storage import Storage
from pipeline.workflow.record import StageProgress

NAME = "publish"
SUMMARY = "Export the evaluated checkpoint as a Hugging Face folder and promote it."
GAUGES: dict[str, str] = {}


def find(config: RunConfig, storage: Storage, records: Records) -> ModelManifest | None:
    assert records.dataset is not None
    assert records.checkpoint is not None
    assert records.evaluation is not None
    version = version_name(config, records.checkpoint, records.evaluation, records.dataset)
    found = registry.find(storage, config.publishing.name, version)
    if found is None or targets.missing(config, records.dataset, records.checkpoint, found, storage):
        return None
    return found


def check(config: RunConfig, storage: Storage, records: Records, *, here: bool) -> None:
    """Its gate is asked where the model is published: `publishing.max_loss` needs the evaluation."""
    if config.publishing.gguf and here and importlib.util.find_spec("gguf") is None:
        raise ConfigError("publishing.gguf: the gguf package is not installed; pip install 'moonlight-pipeline[gguf]'")


def gate(config: RunConfig, storage: Storage) -> tuple[str, str]:
    """(`open` or `closed`, why): the evaluation of the checkpoint that would be published against `publishing.max_loss`."""
    checkpoint = chosen_checkpoint(config, storage)
    if checkpoint is None:
        return "closed", f"run {config.run_id} has not been trained to its end"
    path = manifest_path(config, checkpoint)
    try:
        evaluation = read_record(storage, path, EvaluationManifest)
    except DamagedRecord as error:
        return "closed", str(error)
    if evaluation is None:
        return "closed", f"no evaluation at {storage.uri(path)}"
    if evaluation.checkpoint_digest != checkpoint.digest:
        return "closed", f"{storage.uri(path)} scored another checkpoint of step {checkpoint.step}; evaluate again"
    overall = evaluation.overall
    facts = f"step {evaluation.step}: held-out loss {overall.loss:.4f}, {overall.bits_per_byte:.4f} bits per byte"
    why = refusal(evaluation, config.publishing.max_loss)
    return ("open", facts) if why is None else ("closed", f"{facts}; {why}")


def do(config: RunConfig, storage: Storage, records: Records, report: Callable[[PublishProgress], None]) -> None:
    from jobs.on_ray.publish import publish_with_ray  # here: it brings Ray

    assert records.dataset is not None
    assert records.train is not None
    assert records.evaluation is not None
    publish_with_ray(
        config,
        records.train,
        records.evaluation,
        records.dataset,
        checkpoint=records.checkpoint,
        git_commit=git_commit(),
        report=report,
    )


def progress() -> Callable[[PublishProgress], StageProgress]:
    return _progress


def _progress(at: PublishProgress) -> StageProgress:
    return StageProgress(NAME, at.done_bytes, at.total_bytes, "bytes", 0.0, "bytes", None, at.doing)
