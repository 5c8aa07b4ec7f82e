"""What is known of a run, read from its storage alone: while it works, after it failed, and when it is done.

Anything may be missing, because it has not been made yet or because it is damaged; what could not be read is named in `problems` and
the rest is shown. Reading again costs what has changed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import yaml

from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.evaluation.written import Written, read_texts
from pipeline.file_index import read_dataset
from pipeline.integrity import read_record
from pipeline.manifest import (
    CheckpointManifest,
    DatasetManifest,
    EvaluationManifest,
    ModelManifest,
    TrainManifest,
)
from pipeline.publishing import registry
from pipeline.report.data import SourceData, look_at_data
from pipeline.report.states import StageAttempt, State, attempts_of, state_of
from pipeline.storage import Storage
from pipeline.training.branch import Origin, origin_of
from pipeline.training.commits import committed, lease_path, read_average, read_manifest, train_folder
from pipeline.training.journal import History, JournalReader
from pipeline.training.metrics import read_metrics
from pipeline.workflow.record import StageProgress, read_events, read_progress

SCORES = re.compile(r"step-(\d{8,})(-last-\d+)?\.json")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Run:
    """A run at a moment. What it does not have is None or empty."""

    run_id: str
    now: float  # UNIX
    config: RunConfig | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    progress: StageProgress | None = None
    history: History = field(default_factory=History)
    dataset: DatasetManifest | None = None
    data: tuple[SourceData, ...] = ()
    train: TrainManifest | None = None
    evaluations: tuple[EvaluationManifest, ...] = ()  # of the run's own checkpoints, oldest first
    evaluation: EvaluationManifest | None = None  # the published version's, else the newest
    checkpoint: CheckpointManifest | None = None  # that it scored, else the newest
    evaluation_path: str = ""
    texts: tuple[Written, ...] = ()  # that its checkpoints wrote, oldest first
    model: ModelManifest | None = None
    origin: Origin | None = None  # where it branched off, if it did
    who: str = ""  # asked for it, else trains it
    problems: tuple[str, ...] = ()  # each names a record and what is wrong with it

    @property
    def attempts(self) -> list[StageAttempt]:
        return attempts_of(self.events, self.history, self.now)

    @property
    def state(self) -> State:
        return state_of(self.attempts, self.events, self.progress, self.history, self.now)

    @property
    def step(self) -> int:
        """The last one that is known to be done."""
        logged = self.history.steps[-1]["step"] if self.history.steps else 0
        return max(logged, self.checkpoint.step if self.checkpoint else 0, self.train.steps if self.train else 0)

    @property
    def steps(self) -> int:
        """Of the whole run; 0: not known."""
        logged = self.history.steps[-1].get("steps", 0) if self.history.steps else 0
        return self.train.steps if self.train else logged

    @property
    def loss(self) -> float | None:
        """Nats per token of the last logged step that had one."""
        found = (line["loss"] for line in reversed(self.history.steps) if line.get("loss") is not None)
        return next(found, self.checkpoint.loss if self.checkpoint else None)


def run_ids(storage: Storage) -> list[str]:
    """Of all runs below the root."""
    return sorted(storage.names("runs"))


class RunReader:
    """Reads a run again and again."""

    def __init__(self, storage: Storage, run_id: str, *, samples: bool = True) -> None:
        """`samples`: also look into the prepared data for lengths and examples."""
        self._storage, self._run_id, self._samples = storage, run_id, samples
        self._journal = JournalReader(storage, run_id)
        self._scores: dict[str, EvaluationManifest] = {}
        self._dataset: tuple[DatasetManifest, tuple[SourceData, ...]] | None = None
        self._published: tuple[int, ModelManifest | None] = (-1, None)  # after so many events
        self._problems: list[str] = []

    def read(self) -> Run:
        """What there is now."""
        storage, run_id = self._storage, self._run_id
        self._problems = []
        run = Run(
            run_id,
            time.time(),
            config=self._config(),
            events=read_events(storage, run_id),
            progress=self._tried(lambda: read_progress(storage, run_id)),
            history=self._journal.read(),
            train=self._tried(lambda: read_record(storage, f"{train_folder(run_id)}/manifest.json", TrainManifest)),
            origin=self._tried(lambda: origin_of(run_id, storage)),
        )
        dataset, data = self._data()
        run = replace(run, dataset=dataset, data=data, model=self._model(run))
        run = self._judged(run)
        run = replace(run, texts=tuple(self._tried(lambda: read_texts(storage, run_id)) or ()))
        if not run.history.steps and run.checkpoint is not None:  # of before there were journals
            metrics = run.train.metrics if run.train else run.checkpoint.metrics
            run = replace(run, history=History(steps=read_metrics(metrics, storage)))
        return replace(run, who=self._who(run), problems=tuple(self._problems))

    def _tried(self, read: Callable[[], Found]) -> Found | None:
        """What it gives; None where the record is damaged, or not for the eyes of this stage, which is noted."""
        try:
            return read()
        except (ValueError, PermissionError) as error:
            self._problems.append(" ".join(str(error).split()))
            return None

    def _config(self) -> RunConfig | None:
        path = f"runs/{self._run_id}/config.yaml"
        data = self._storage.read_or_none(path)
        if data is None:
            return None
        try:
            values = yaml.safe_load(data)
            if not isinstance(values, dict):
                raise ValueError("no settings")
            return validate(values)
        except (ValueError, yaml.YAMLError) as error:
            why = " ".join(str(error).split())
            self._problems.append(f"{self._storage.uri(path)}: {why}; the pipeline writes it anew when it is started")
            return None

    def _data(self) -> tuple[DatasetManifest | None, tuple[SourceData, ...]]:
        path = f"runs/{self._run_id}/dataset.json"
        data = self._storage.read_or_none(path)
        if data is None:
            return None, ()
        held = self._tried(lambda: _held(data, self._storage.uri(path)))
        if held is None:
            return None, ()
        if self._dataset is None or self._dataset[0].identity != held:
            dataset = self._tried(lambda: _dataset(self._storage, held))
            if dataset is None:
                return None, ()
            seen = self._tried(lambda: look_at_data(self._storage, dataset)) if self._samples else ()
            self._dataset = dataset, tuple(seen or ())
        return self._dataset

    def _model(self, run: Run) -> ModelManifest | None:
        """The version of the chosen checkpoint; of several, as of other settings, the promoted one, else the last by name. With
        `publishing.revisions` other steps have versions, too."""
        if run.config is None or not any(event["stage"] == "publish" for event in run.events):
            return None
        if self._published[0] != len(run.events):
            name = run.config.publishing.name
            chosen = run.config.evaluation.checkpoint
            step = chosen if chosen != "last" else run.train.steps if run.train else 0
            latest = self._tried(lambda: registry.latest(self._storage, name))
            promoted = "" if latest is None else latest.version
            found = max(
                self._versions(name),
                key=lambda each: (each.step == step, each.version == promoted, each.version),
                default=None,
            )
            self._published = len(run.events), found
        return self._published[1]

    def _versions(self, name: str) -> Iterator[ModelManifest]:
        """Of this run."""
        for version in sorted(each for each in self._storage.names(f"models/{name}") if not each.endswith(".json")):
            manifest = self._tried(lambda: registry.find(self._storage, name, version))  # noqa: B023
            if manifest is not None and manifest.config.get("run_id") == self._run_id:
                yield manifest

    def _judged(self, run: Run) -> Run:
        folder = f"runs/{self._run_id}/evaluate"
        by_path: dict[str, EvaluationManifest] = {}
        for name in sorted(name for name in self._storage.names(folder) if SCORES.fullmatch(name)):
            path = f"{folder}/{name}"
            if path not in self._scores:
                found = self._tried(lambda: read_record(self._storage, path, EvaluationManifest))  # noqa: B023
                if found is None:
                    continue
                self._scores[path] = found
            by_path[path] = self._scores[path]
        own = [each for path, each in by_path.items() if "-last-" not in path and each.tokens_seen is not None]
        own.sort(key=lambda each: each.step)
        chosen = [path for path, each in by_path.items() if run.model and each.digest == run.model.evaluation_digest]
        chosen = chosen or sorted(by_path, key=lambda path: (by_path[path].step, path))[-1:]
        path = chosen[0] if chosen else ""
        checkpoint = self._tried(lambda: _checkpoint(self._storage, run, path))
        return replace(
            run,
            evaluations=tuple(own),
            evaluation=by_path.get(path),
            evaluation_path=path,
            checkpoint=checkpoint,
        )

    def _who(self, run: Run) -> str:
        asked = [str(event["by"]) for event in run.events if event["event"] == "asked" and event.get("by")]
        if asked:
            return asked[-1]
        data = self._storage.read_or_none(lease_path(self._run_id)) or b""
        try:
            found = yaml.safe_load(data) or {}
        except yaml.YAMLError:
            return ""
        who = str(found.get("who", "")) if isinstance(found, dict) else ""
        return who.partition(" (process")[0]


def read_run(storage: Storage, run_id: str) -> Run:
    """A run as it is now."""
    return RunReader(storage, run_id).read()


def _held(data: bytes, where: str) -> str:
    """The dataset that a run holds on to (jobs/stages/records.py writes it). Raises ValueError."""
    try:
        return str(yaml.safe_load(data)["dataset"])
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(
            f"{where}: not a sound record of the run's dataset ({error!r}); prepare writes it anew"
        ) from None


def _dataset(storage: Storage, identity: str) -> DatasetManifest:
    try:
        return read_dataset(storage, identity)
    except FileNotFoundError:
        raise ValueError(
            f"{storage.uri(f'datasets/{identity}')}: the run's dataset is gone; prepare makes it again"
        ) from None


def _checkpoint(storage: Storage, run: Run, evaluation_path: str) -> CheckpointManifest | None:
    """The one that the evaluation scored; of one that is gone, and without an evaluation, the newest. Raises DamagedRecord."""
    match = SCORES.fullmatch(evaluation_path.rpartition("/")[2])
    if match is not None:
        step, last = int(match[1]), match[2]
        count = int(last.removeprefix("-last-")) if last else 0
        found = read_average(storage, run.run_id, step, count) if count else read_manifest(storage, run.run_id, step)
        if found is not None:
            return found
    if run.train is not None:
        return run.train.checkpoint
    return next(iter(reversed(committed(storage, run.run_id))), None)
