"""The gates' answer about a run's evaluation, with what it needs read from storage. No torch in here."""

from __future__ import annotations

from pipeline.config.outcome import PublishingConfig
from pipeline.evaluation import documents
from pipeline.integrity import read_checked, read_record
from pipeline.manifest import EvaluationManifest, ModelManifest
from pipeline.publishing import registry
from pipeline.publishing.compare import Scored
from pipeline.publishing.gate import Answer, judge
from pipeline.storage import Storage

EVALUATION = "evaluation.json"  # in a published folder, beside documents.PUBLISHED


def ask(
    settings: PublishingConfig, evaluation: EvaluationManifest, storage: Storage, *, settled: bool = False
) -> Answer:
    """May the model with this evaluation be published beside the one that is promoted now? `settled`: it has been promoted once, so
    it is not compared with what came after it.

    Raises ValueError for a promoted model whose evaluation is lost, and DamagedFile, DamagedRecord.
    """
    if settled:
        fixed = tuple(gate for gate in settings.gates if gate.worse_by is None)
        settings = settings.model_copy(update={"gates": fixed})
    beside = any(gate.worse_by is not None for gate in settings.gates)
    promoted = promoted_model(storage, settings.name) if beside else None
    kept = documents.read(storage, evaluation) if promoted is not None else None
    return judge(settings, Scored(f"step {evaluation.step}", evaluation, kept), promoted)


def promoted_model(storage: Storage, name: str) -> Scored | None:
    """What the promoted version scored, None before the first. Raises as `ask` does."""
    latest = registry.latest(storage, name)
    if latest is None:
        return None
    manifest = registry.find(storage, name, latest.version)
    if manifest is None:
        raise ValueError(
            f"{storage.uri(registry.latest_path(name))}: its version {latest.version} is gone; moonlight models rollback {name}"
        )
    return scored(storage, manifest)


def scored(storage: Storage, manifest: ModelManifest) -> Scored:
    """What a published version scored: from its own folder, or where an older publisher left it there not, from its run.

    Raises ValueError if neither has it.
    """
    folder = registry.folder(manifest.name, manifest.version)
    inside = {entry.path: entry for entry in manifest.files}
    name = f"{manifest.name} {manifest.version}"
    if EVALUATION in inside:
        where = storage.uri(f"{folder}/{EVALUATION}")
        found = EvaluationManifest.parse(read_checked(storage, inside[EVALUATION], folder), where)
        entry = inside.get(documents.PUBLISHED)
        kept = None if entry is None else documents.Documents.parse(read_checked(storage, entry, folder))
        return Scored(name, found, kept)
    path = f"runs/{manifest.config.get('run_id')}/evaluate/step-{manifest.step:08d}.json"
    record = read_record(storage, path, EvaluationManifest)
    if record is None or record.digest != manifest.evaluation_digest:
        raise ValueError(
            f"{name} is promoted and its evaluation is neither in its folder nor at {storage.uri(path)}: no gate can compare with it. "
            f"Promote a version that has one (moonlight models list {manifest.name}), or leave out the gates with worse_by"
        )
    return Scored(name, record, documents.read(storage, record))


def published_files(storage: Storage, evaluation: EvaluationManifest) -> dict[str, bytes]:
    """What a published folder holds of the evaluation, by file name."""
    found = {EVALUATION: evaluation.to_json()}
    if evaluation.documents is not None:
        found[documents.PUBLISHED] = read_checked(storage, evaluation.documents)
    return found
