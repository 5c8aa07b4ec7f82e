"""The questions and answers of tasks, as the harness itself words them: what is looked for in a corpus.

Of every document that a task is scored on: the prompt without examples, the prompt with its answer, and each field that stands in the prompt
as it is (a corpus has no `Question:` and `Answer:` around it). Where the task says what to look for (`should_decontaminate`,
`doc_to_decontamination_query`), that comes in the prompt's place. Its key is the harness's own hash of the document, under which its
scores are kept (documents.py).
"""

from __future__ import annotations

import json
from typing import Any

from pipeline.config.load import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.evaluation.tasks import read
from pipeline.manifest import digest_of

VERSION = 1  # raise when the same tasks would give other texts
KEY = "corpus.decontamination.tasks"
Texts = dict[str, list[tuple[str, list[str]]]]
"""Of each task its questions: (key, texts)."""


def names(config: RunConfig) -> tuple[list[str], list[str]]:
    """Those of evaluation.tasks, and those that are only looked for."""
    section = config.corpus.decontamination
    return list(config.evaluation.tasks), [] if section is None else list(section.tasks)


def asked(config: RunConfig, folder: str | None) -> str:
    """Digest of what decides the questions, as far as it is known without reading data: names, and the content of the task folder."""
    return digest_of(
        {"version": VERSION, "tasks": sorted(name for each in names(config) for name in each), "folder": folder}
    )


def questions(config: RunConfig) -> Texts:
    """Of all tasks. Raises ConfigError for one whose data cannot be read."""
    found: Texts = {}
    for key, wanted in zip(("evaluation.tasks", KEY), names(config)):
        if wanted:
            with read(config, wanted, key) as tasks:
                for name, task in tasks.items():
                    found[name] = _of_task(key, name, task)
    return found


def key_of(document: Any) -> str:
    """`doc_hash` of lm-eval's logged samples."""
    from lm_eval.utils import handle_non_serializable, hash_string

    text = json.dumps(document, indent=2, default=handle_non_serializable, ensure_ascii=False)
    found: str = hash_string(text)
    return found


def _of_task(key: str, name: str, task: Any) -> list[tuple[str, list[str]]]:
    try:
        return [(key_of(document), _texts(task, document)) for document in task.eval_docs]
    except Exception as error:  # a task's own code
        raise ConfigError(
            f"{key}: the questions of {name} cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]}); correct the "
            "task, or leave it out"
        ) from error


def _texts(task: Any, document: Any) -> list[str]:
    choices = task.doc_to_choice(document) if getattr(task.config, "doc_to_choice", None) is not None else []
    prompt = task.doc_to_decontamination_query(document) if task.should_decontaminate() else task.doc_to_text(document)
    prompts = _worded(prompt, choices)
    target = task.doc_to_target(document)
    answers = [word for each in (target if isinstance(target, list) else [target]) for word in _worded(each, choices)]
    fields = document.items() if isinstance(document, dict) else ()
    own = [text for _, text in fields if isinstance(text, str) and any(text.strip() in prompt for prompt in prompts)]
    texts = [*prompts, *(f"{prompt} {answer}" for prompt in prompts for answer in answers), *own]
    return [text for text in dict.fromkeys(map(str.strip, texts)) if text]


def _worded(value: Any, choices: list[str]) -> list[str]:
    """An answer may be the number of a choice."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [choices[value]] if choices else [str(value)]
    return [str(value)]
