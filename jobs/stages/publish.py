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
from pipeline.publishing.ask import ask
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
    name = config.publishing.name
    version = version_name(config, records.checkpoint, records.evaluation, records.dataset)
    manifest = registry.find(storage, name, version)
    if manifest is None or targets.missing(config, records.dataset, records.checkpoint, manifest, storage):
        return None
    if config.publishing.promote and not registry.is_settled(registry.latest(storage, name), manifest):
        return None  # its publisher ended between the last file and the promotion
    return manifest


def check(config: RunConfig, storage: Storage, records: Records, *, here: bool) -> None:
    """Raises GateError if a gate is closed, before hardware is asked for. The stage asks the same again."""
    if config.publishing.gguf and here and importlib.util.find_spec("gguf") is None:
        raise ConfigError("publishing.gguf: the gguf package is not installed; pip install 'moonlight-pipeline[gguf]'")
    if records.evaluation is not None and records.checkpoint is not None and records.dataset is not None:
        name = config.publishing.name
        version = version_name(config, records.checkpoint, records.evaluation, records.dataset)
        manifest = registry.find(storage, name, version)
        settled = manifest is not None and registry.is_settled(registry.latest(storage, name), manifest)
        ask(config.publishing, records.evaluation, storage, settled=settled).require()


def gate(config: RunConfig, storage: Storage) -> tuple[str, str, str]:
    """(`open` or `closed`, why, a table): all gates about the evaluation of the checkpoint that would be published."""
    checkpoint = chosen_checkpoint(config, storage)
    if checkpoint is None:
        return "closed", f"run {config.run_id} has not been trained to its end, or not been averaged", ""
    path = manifest_path(config, checkpoint)
    try:
        evaluation = read_record(storage, path, EvaluationManifest)
    except DamagedRecord as error:
        return "closed", str(error), ""
    if evaluation is None:
        return "closed", f"no evaluation at {storage.uri(path)}", ""
    if evaluation.checkpoint_digest != checkpoint.digest:
        return "closed", f"{storage.uri(path)} scored another checkpoint of step {checkpoint.step}; evaluate again", ""
    overall = evaluation.overall
    facts = f"step {evaluation.step}: held-out loss {overall.loss:.4f}, {overall.bits_per_byte:.4f} bits per byte"
    answer = ask(config.publishing, evaluation, storage)
    return ("open", facts, answer.table()) if answer.open else ("closed", f"{facts}; {answer.why}", answer.table())


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
