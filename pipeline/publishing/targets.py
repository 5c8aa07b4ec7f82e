"""What a run publishes, and where: the chosen checkpoint, with `publishing.revisions` every other one that has been evaluated, each also
as a revision of `publishing.hub.repo`.

A version of the storage comes first, complete; the hub gets what lies there. What has been done is told by what was recorded
(`registry`, `hub.Pushed`), so a publication that was cut off anywhere goes on with the same command.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.schema import RunConfig
from pipeline.evaluation.result import committed as evaluation_of
from pipeline.integrity import read_record
from pipeline.manifest import CheckpointManifest, DatasetManifest, EvaluationManifest, ModelManifest
from pipeline.publishing import registry
from pipeline.publishing.gate import not_a_score
from pipeline.publishing.hub import Pushed, record_path, revision_of
from pipeline.publishing.version import version_name
from pipeline.storage import Storage
from pipeline.training.commits import committed

MAIN = "main"


def others(
    config: RunConfig, dataset: DatasetManifest, chosen: CheckpointManifest, storage: Storage
) -> Iterator[tuple[CheckpointManifest, EvaluationManifest]]:
    """Every other checkpoint of the run that has been evaluated, with scores that are numbers, oldest first; none unless
    `publishing.revisions`. Limits on them are for what is promoted."""
    if not config.publishing.revisions:
        return
    for checkpoint in committed(storage, config.run_id):
        evaluation = None if checkpoint.step == chosen.step else _scores(config, dataset, checkpoint, storage)
        if evaluation is not None and not_a_score(evaluation) is None:
            yield checkpoint, evaluation


def _scores(
    config: RunConfig, dataset: DatasetManifest, checkpoint: CheckpointManifest, storage: Storage
) -> EvaluationManifest | None:
    """With tasks or without: not every checkpoint is asked them."""
    return evaluation_of(config, dataset, checkpoint, storage, with_tasks=False)


def missing(
    config: RunConfig, dataset: DatasetManifest, chosen: CheckpointManifest, model: ModelManifest, storage: Storage
) -> str:
    """What is not published yet although the chosen version is; '' if nothing is."""
    versions = [model]
    for checkpoint, evaluation in others(config, dataset, chosen, storage):
        name = version_name(config, checkpoint, evaluation, dataset)
        found = registry.find(storage, config.publishing.name, name)
        if found is None:
            return f"step {checkpoint.step}"
        versions.append(found)
    for version in versions:
        if revision := next(unpushed(config, version, storage), None):
            return f"revision {revision} of {config.publishing.hub.repo}"
    return ""


def unpushed(config: RunConfig, model: ModelManifest, storage: Storage) -> Iterator[str]:
    """Revisions of the hub that should hold this version and do not, by our records."""
    repo = config.publishing.hub.repo
    if repo is None:
        return
    for revision in (revision_of(model), *([MAIN] if is_promoted(model, storage) else ())):
        pushed = read_record(storage, record_path(repo, revision), Pushed)
        if pushed is None or pushed.manifest_digest != model.digest:
            yield revision


def is_promoted(model: ModelManifest, storage: Storage) -> bool:
    latest = registry.latest(storage, model.name)
    return latest is not None and latest.version == model.version
