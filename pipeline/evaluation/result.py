"""The result of an evaluation: where it lies, which inputs it belongs to, and how far its making is.

No torch in here: asking whether a checkpoint has been scored costs the reading of one small file.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.schema import RunConfig
from pipeline.evaluation import tasks
from pipeline.integrity import read_record
from pipeline.manifest import CheckpointManifest, DamagedRecord, DatasetManifest, EvaluationManifest, digest_of
from pipeline.optim.schedule import total_steps
from pipeline.storage import Storage

FORMAT = 1  # enters the identity: raise it when the same inputs would score differently


@dataclass(frozen=True)
class EvaluationProgress:
    """Windows of all sources are scored in one go; `loss` is the mean over this process's tokens so far (nats).

    Tasks come after them, one kind of request after the other: `doing` names it, and the tokens are those of its requests.
    """

    new_tokens: int  # since the last report
    done_tokens: int
    total_tokens: int
    loss: float | None = None
    doing: str = ""


def identity(
    config: RunConfig, dataset: DatasetManifest, checkpoint: CheckpointManifest, *, with_tasks: bool = True
) -> str:
    """Digest of everything that decides the scores, those of tasks or not."""
    return digest_of(
        {
            "format": FORMAT,
            "checkpoint": checkpoint.digest,
            "dataset": dataset.digest,
            "model": config.model.model_dump(mode="json"),
            "sequence_length": window_length(config),
            "max_tokens_per_source": config.evaluation.max_tokens_per_source,
            **(tasks.identity(config) if with_tasks else {}),
        }
    )


def manifest_path(config: RunConfig, checkpoint: CheckpointManifest) -> str:
    count = len(checkpoint.average_of)
    return f"runs/{config.run_id}/evaluate/step-{checkpoint.step:08d}{f'-last-{count}' if count else ''}.json"


def committed(
    config: RunConfig,
    dataset: DatasetManifest,
    checkpoint: CheckpointManifest,
    storage: Storage,
    *,
    with_tasks: bool = True,
) -> EvaluationManifest | None:
    """The result of these inputs, if there is one; without `with_tasks` one that has them is as good."""
    found = read_record(storage, manifest_path(config, checkpoint), EvaluationManifest)
    if found is None:
        return None
    wanted = {identity(config, dataset, checkpoint, with_tasks=each) for each in {True, with_tasks}}
    return found if found.identity in wanted else None


def commit(config: RunConfig, checkpoint: CheckpointManifest, manifest: EvaluationManifest, storage: Storage) -> None:
    """Store the result, unless there is one of the same inputs: of two evaluators the first one's counts, for both. Other
    hardware may sum in another order, and the published version is named after the result."""
    path = manifest_path(config, checkpoint)
    while True:
        etag = storage.etag(path)
        try:
            found = read_record(storage, path, EvaluationManifest)
        except DamagedRecord:
            found = None
        if (found is not None and found.identity == manifest.identity) or storage.swap(path, manifest.to_json(), etag):
            return


def tasks_are_due(config: RunConfig, step: int) -> bool:
    """Are tasks scored at this step's checkpoint? At the chosen one always, and every `evaluation.tasks_every` steps."""
    evaluation = config.evaluation
    if not evaluation.tasks:
        return False
    last = total_steps(config.schedule, config.training.sequence_length)
    chosen = last if evaluation.checkpoint == "last" else evaluation.checkpoint
    return step == chosen or (evaluation.tasks_every is not None and step % evaluation.tasks_every == 0)


def window_length(config: RunConfig) -> int:
    return config.evaluation.sequence_length or config.training.sequence_length
