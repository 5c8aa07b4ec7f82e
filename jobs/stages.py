"""The four stages, as every front door runs them: what is already done, and how to do the rest.

A stage is a function from the records before it and its configuration to one record in storage. `find` returns that
record if it is there and was made from exactly these inputs; `run` makes it. So a finished stage costs a read, and after
any crash the same command goes on where the records end.
"""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_prep.listing import InputFile
from data_prep.plan import format_of, is_compressed
from data_prep.prepare import identity as dataset_identity
from data_prep.prepare import prepare, settings_digest
from data_prep.records import PrepareProgress, dataset_path
from data_prep.tokenizer_stage import find_tokenizer
from jobs.gauges import PrepareGauges
from pipeline.config.load import ConfigError
from pipeline.config.schema import MixtureStage, RunConfig
from pipeline.dataset.order import check_demand
from pipeline.evaluation import result, tasks
from pipeline.evaluation.result import EvaluationProgress
from pipeline.manifest import (
    CheckpointManifest,
    DatasetManifest,
    EvaluationManifest,
    ModelManifest,
    Record,
    TrainManifest,
)
from pipeline.publishing import registry
from pipeline.publishing.version import PublishProgress, version_name
from pipeline.storage import Storage
from pipeline.training import initial
from pipeline.training.commits import committed as committed_checkpoints
from pipeline.training.commits import train_folder
from pipeline.training.identity import run_identity
from pipeline.training.metrics import TrainProgress
from pipeline.workflow.record import STAGES, ProgressFile, StageProgress, add_event

SHORTEST_LINE = 12  # bytes of {"text":"x"}


class MissingInput(ValueError):
    """A stage before this one has not been done; the message has the command that does it."""


class HeldDataset(Record):
    """`<root>/runs/<run_id>/dataset.json`: which version of its corpus a run works on."""

    dataset: str  # identity
    settings: str  # digest of the settings it was made with: with others it is not this run's dataset


@dataclass
class Records:
    """What the stages of a run have left so far; None from the first one that is not done."""

    dataset: DatasetManifest | None = None
    train: TrainManifest | None = None
    checkpoint: CheckpointManifest | None = None  # the one to evaluate and publish
    evaluation: EvaluationManifest | None = None
    model: ModelManifest | None = None

    def done(self, stage: str) -> bool:
        return {
            "prepare": self.dataset,
            "train": self.train,
            "evaluate": self.evaluation,
            "publish": self.model,
        }[stage] is not None


def find(config: RunConfig, storage: Storage, stage: str = "prepare") -> Records:
    """Read the records of the run, stage by stage, as `stage` sees them (see `held_dataset`).

    Raises ConfigError for a corpus that is missing or empty, and for a demand that the prepared data cannot meet."""
    records = Records()
    data = storage.read_or_none(dataset_path(held_dataset(config, storage, stage) or dataset_identity(config, storage)))
    if data is None:
        return records
    records.dataset = DatasetManifest.model_validate_json(data)
    try:
        check_demand(config, records.dataset)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    data = storage.read_or_none(f"{train_folder(config.run_id)}/manifest.json")
    train = None if data is None else TrainManifest.model_validate_json(data)
    if train is None or train.identity != run_identity(config, records.dataset):
        return records
    records.train = train
    records.checkpoint = _chosen_checkpoint(config, train, storage)
    records.evaluation = result.committed(config, records.dataset, records.checkpoint, storage)
    if records.evaluation is not None:
        version = version_name(config, records.checkpoint, records.evaluation, records.dataset)
        records.model = registry.find(storage, config.publishing.name, version)
    return records


def held_dataset(config: RunConfig, storage: Storage, stage: str = "prepare") -> str | None:
    """The dataset that the run holds on to; None if it takes the corpus as it is now.

    A corpus may grow at any time, also while a run waits for its GPUs or trains for weeks. So prepare follows the corpus until
    training has begun; the stages after it use what prepare left, and from the first step on so does the whole run. New files
    are for the next run.
    """
    data = storage.read_or_none(held_path(config.run_id))
    held = None if data is None else HeldDataset.model_validate_json(data)
    if held is None or held.settings != settings_digest(config):
        return None
    if stage == "prepare" and not storage.list(train_folder(config.run_id)):
        return None
    return held.dataset


def finished(stage: str, config: RunConfig, storage: Storage) -> bool:
    """Has the stage that just ended left its record? What came into the corpus while prepare was at work does not count."""
    return find(config, storage, "train" if stage == "prepare" else stage).done(stage)


def hold_dataset(config: RunConfig, storage: Storage, records: Records) -> None:
    """Hold on to the dataset that was found, if one was."""
    if records.dataset is not None:
        held = HeldDataset(dataset=records.dataset.identity, settings=settings_digest(config)).to_json()
        if storage.read_or_none(held_path(config.run_id)) != held:
            storage.write(held_path(config.run_id), held)


def held_path(run_id: str) -> str:
    return f"runs/{run_id}/dataset.json"


def require_inputs(stage: str, config: RunConfig, storage: Storage, records: Records) -> None:
    """Raises MissingInput for the first stage before this one that is not done, and ConfigError if training could not start
    from the weights that the run has pinned. Costs a few reads: ask before any hardware is asked for."""
    for earlier in STAGES[: STAGES.index(stage)]:
        if not records.done(earlier):
            raise MissingInput(
                f"{stage} needs the result of {earlier}, which is not there; run python -m jobs.{earlier}"
            )
    if stage == "train":
        assert records.dataset is not None
        if not committed_checkpoints(storage, config.run_id):  # later the weights are in the checkpoints
            initial.check(config, storage, records.dataset.tokenizer.sha256)


def run(stage: str, config: RunConfig, storage: Storage) -> None:
    """Do one stage on the connected Ray cluster; nothing if it is done. Raises MissingInput and what the stage raises."""
    records = find(config, storage, stage)
    hold_dataset(config, storage, records)
    if records.done(stage):
        print(f"{stage}: up to date", flush=True)
        return
    require_inputs(stage, config, storage, records)
    add_event(storage, config.run_id, "started", stage)
    start = time.monotonic()
    try:
        _do(stage, config, storage, records)
    except BaseException as error:
        seconds = round(time.monotonic() - start, 3)
        add_event(
            storage, config.run_id, "failed", stage, seconds=seconds, error=f"{type(error).__name__}: {error}"[:500]
        )
        raise
    add_event(storage, config.run_id, "finished", stage, seconds=round(time.monotonic() - start, 3))


def check_supply(config: RunConfig, listings: dict[str, list[InputFile]]) -> None:
    """Refuse, before any work, a demand that no tokenizer could meet. Raises ConfigError.

    Generous, because only the tokenized corpus knows (`check_demand`, after prepare): a token is at least one byte or ends a
    document, packing fills rows at least half, and a document is a file or a line of some bytes. Nothing bounds what a
    compressed file holds, or how empty the rows of `data.packing=pad` are.
    """
    for index, source in enumerate(config.corpus.sources):
        files = listings[source.name]
        formats = {format_of(file.path, source.format) for file in files}
        if config.data.packing == "pad" or "parquet" in formats or any(is_compressed(file.path) for file in files):
            continue
        size = sum(file.bytes for file in files)
        documents = len(files) + (size // SHORTEST_LINE if "jsonl" in formats else 0)
        padded = documents * config.data.sequence_length // config.data.max_documents_per_row
        most = int(source.max_epochs * (2 * (size + documents) + padded))
        demand = _demand(config, source.name)
        if demand > most:
            raise ConfigError(
                f"schedule.total_tokens {config.schedule.total_tokens:,} asks for {demand:,.0f} tokens of source {source.name!r}, "
                f"whose {size:,} bytes give less than {most:,} over the epochs allowed: add text, raise "
                f"corpus.sources[{index}].max_epochs, lower its weight or train on less"
            )


def check_tokenizer(config: RunConfig, storage: Storage, listings: dict[str, list[InputFile]]) -> None:
    """Refuse, before prepare, a corpus whose tokenizer is not that of the model the run starts from. Raises ConfigError."""
    manifest = initial.find(config, storage)
    if manifest is None:
        return
    tokenizer = find_tokenizer(config, storage, listings)
    if tokenizer is not None:
        initial.check(config, storage, tokenizer.sha256)
    elif config.tokenizer.path is None:
        folder = storage.uri(registry.folder(manifest.name, manifest.version))
        raise ConfigError(
            f"tokenizer.path: the corpus lost files or the tokenizer's settings changed, so a new one would be trained, but the run "
            f"starts from {manifest.name} {manifest.version}: set tokenizer.path to {folder}"
        )


def check_tasks(config: RunConfig, records: Records, *, data: bool = True) -> None:
    """Refuse, before anything starts, tasks of lm-eval that could not be scored. Raises ConfigError.

    `data=False` where another machine does the work: it may reach what this one does not.
    """
    if not records.done("evaluate"):
        tasks.check(config, data=data)


def _demand(config: RunConfig, source: str) -> float:
    """Tokens of the whole run that come from a source, by the mixture's weights."""
    total, before, demand = config.schedule.total_tokens, 0, 0.0
    weights = {each.name: each.weight for each in config.corpus.sources}
    for stage in config.corpus.mixture or (MixtureStage(until_tokens=total, weights=weights),):
        share = stage.weights.get(source, 0.0) / sum(stage.weights.values())
        demand += share * (min(stage.until_tokens, total) - min(before, total))
        before = stage.until_tokens
    return demand


def git_commit() -> str:
    """Of the code that runs: from the image or submission, else from the checkout; 'unknown' outside of both."""
    given = os.environ.get("MOONLIGHT_GIT_COMMIT")
    if given and given != "unknown":
        return given
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _chosen_checkpoint(config: RunConfig, train: TrainManifest, storage: Storage) -> CheckpointManifest:
    wanted = config.evaluation.checkpoint
    if wanted == "last" or wanted == train.checkpoint.step:
        return train.checkpoint
    found = {manifest.step: manifest for manifest in committed_checkpoints(storage, config.run_id)}
    if wanted not in found:
        raise ConfigError(f"evaluation.checkpoint {wanted}: no such checkpoint; there are {sorted(found)}")
    return found[wanted]


def _do(stage: str, config: RunConfig, storage: Storage, records: Records) -> None:
    # Each stage brings its own heavy imports (torch: 150 MB a process): looking at what is done needs none of them.
    show = ProgressFile(config.storage, config.run_id)
    if stage == "prepare":
        from data_prep.mapping import map_on_ray

        report = partial(_prepare, show, PrepareGauges(config.run_id))
        dataset = prepare(config, storage, map_units=map_on_ray(config.cluster), report=report)
        try:
            check_demand(config, dataset)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        hold_dataset(config, storage, Records(dataset=dataset))
        return
    assert records.dataset is not None
    if stage == "train":
        from jobs.train import train_with_ray

        train_with_ray(config, records.dataset, storage, report=partial(_train, show))
        return
    assert records.train is not None
    assert records.checkpoint is not None
    if stage == "evaluate":
        from jobs.evaluate import evaluate_with_ray

        evaluate_with_ray(config, records.dataset, records.checkpoint, storage, report=_Evaluation(show))
        return
    from jobs.publish import publish_with_ray

    assert records.evaluation is not None
    publish_with_ray(
        config,
        records.train,
        records.evaluation,
        records.dataset,
        checkpoint=records.checkpoint,
        git_commit=git_commit(),
        report=partial(_publish, show),
    )


def _prepare(show: ProgressFile, gauges: PrepareGauges, at: PrepareProgress) -> None:
    gauges(at)
    note = (
        f"{at.phase}  {at.documents:,} documents  {at.text_bytes / 1e6:,.1f} MB ({at.megabytes_per_second:,.1f} MB/s)"
    )
    if at.units_failed:
        note += f"  {at.units_failed} FAILED"
    show(
        StageProgress(
            "prepare", at.units_done, at.units_total, "units", at.tokens_per_second, "tokens", at.eta_seconds, note
        )
    )


def _train(show: ProgressFile, at: TrainProgress) -> None:
    show(
        StageProgress(
            "train", at.step, at.steps, "steps", at.tokens_per_second, "tokens", at.eta_s, f"loss {at.loss:.4f}"
        )
    )


class _Evaluation:
    """Rate and ETA from the tokens done since the first report of what is being done."""

    def __init__(self, show: ProgressFile) -> None:
        self._show = show
        self._doing: str | None = None
        self._start, self._before = 0.0, 0

    def __call__(self, at: EvaluationProgress) -> None:
        now = time.monotonic()
        if at.doing != self._doing or at.done_tokens < self._before:
            self._doing, self._start = at.doing, now
        self._before = at.done_tokens
        rate = at.done_tokens / (now - self._start) if now > self._start else 0.0
        eta = (at.total_tokens - at.done_tokens) / rate if rate else None
        note = at.doing or f"loss {at.loss:.4f}"
        self._show(StageProgress("evaluate", at.done_tokens, at.total_tokens, "tokens", rate, "tokens", eta, note))


def _publish(show: ProgressFile, at: PublishProgress) -> None:
    show(StageProgress("publish", at.done_bytes, at.total_bytes, "bytes", 0.0, "bytes", None, at.doing))
