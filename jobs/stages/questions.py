"""Which questions a run's corpus is searched for: the harness is asked once, and the answer is pinned.

    <root>/runs/<run_id>/questions.json     the digest of what was asked (names of tasks, content of the task folder), and the
                                            sha256 of the questions, which lie in datasets/questions/

So a run that goes on needs no task's data again, and all its stages speak of the same dataset. Other tasks, or an edited one, are asked
again as long as the run has not begun to train; from then on the answer holds, for weights were trained on what it left.
"""

from __future__ import annotations

from data_prep.contamination.questions import find_questions, questions_path, write_questions
from pipeline.config.schema import RunConfig
from pipeline.evaluation import tasks
from pipeline.evaluation.questions import asked, questions
from pipeline.integrity import read_record
from pipeline.manifest import Record
from pipeline.storage import Storage
from pipeline.training.commits import train_folder


class Answer(Record):
    """The object itself."""

    asked: str
    questions: str


def answer_path(run_id: str) -> str:
    return f"runs/{run_id}/questions.json"


def pinned(config: RunConfig, storage: Storage) -> RunConfig:
    """The configuration with `corpus.decontamination.questions`, if this run has asked for what it asks for now. Raises ConfigError."""
    section = config.corpus.decontamination
    if section is None or section.questions is not None:
        return config
    answer = read_record(storage, answer_path(config.run_id), Answer)
    if answer is None:
        return config
    if not storage.names(train_folder(config.run_id)) and answer.asked != asked(config, tasks.folder_digest(config)):
        return config
    return _with(config, answer.questions)


def pin(config: RunConfig, storage: Storage) -> RunConfig:
    """The same, and a run that has not asked asks now. Raises ConfigError for a task whose data cannot be read."""
    if config.corpus.decontamination is None or config.corpus.decontamination.questions is not None:
        return config
    found = pinned(config, storage)
    section = found.corpus.decontamination
    if section is not None and section.questions is not None and storage.exists(questions_path(section.questions)):
        return found
    sha256 = write_questions(storage, questions(config))
    answer = Answer(asked=asked(config, tasks.folder_digest(config)), questions=sha256)
    storage.write(answer_path(config.run_id), answer.to_json())
    return _with(config, sha256)


def check(config: RunConfig, storage: Storage) -> None:
    """What `pin` would have to say, without writing. Raises ConfigError."""
    section = pinned(config, storage).corpus.decontamination
    if section is not None and section.questions is None:
        questions(config)
    else:
        find_questions(storage, section)


def _with(config: RunConfig, sha256: str) -> RunConfig:
    section = config.corpus.decontamination
    assert section is not None
    corpus = config.corpus.model_copy(update={"decontamination": section.model_copy(update={"questions": sha256})})
    return config.model_copy(update={"corpus": corpus})
