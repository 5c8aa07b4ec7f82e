"""A classifier of one's own: a function over batches of texts whose scores decide who stays.

Batches are `batch_size` texts in the documents' order, of what the rules before left of a piece of a unit, so a unit that is done again
calls the function with the same batches, whoever runs it. Where it runs is the caller's (`Call`): in this process, or in Ray actors of its
own (actors.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config.classifier import Classifier
from pipeline.config.load import ConfigError

Scores = NDArray[np.float64]
Call = Callable[[Classifier, Sequence[Sequence[str]]], Sequence[Scores | str]]
"""(settings, batches of texts) -> of each batch the scores, or what is wrong with them."""


class ClassifierFailed(ValueError):
    """What the function did, and what it should do."""


def load(settings: Classifier) -> Callable[[list[str]], Any]:
    """The function. Raises ClassifierFailed where there is none, or one of another version."""
    module, _, name = settings.function.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ClassifierFailed(
            f"cannot be loaded ({_told(error)}); install its package on every node, put its folder on PYTHONPATH, or correct the name"
        ) from None
    if not callable(function):
        raise ClassifierFailed(f"is a {type(function).__name__}; name a function that takes a list of texts")
    version = getattr(function, "version", settings.version)
    if version != settings.version:
        raise ClassifierFailed(
            f"is of version {version!r}, and the setting says {settings.version!r}; set version to {version!r}"
        )
    return function


def in_process(settings: Classifier, batches: Sequence[Sequence[str]]) -> list[Scores | str]:
    return [called(settings, batch) for batch in batches]


def called(settings: Classifier, texts: Sequence[str]) -> Scores | str:
    """Of each text, as the function gave them: their number is not looked at."""
    try:
        return np.asarray(load(settings)(list(texts)), np.float64)
    except ClassifierFailed as error:
        return str(error)
    except Exception as error:
        return f"raises {_told(error)}; mend it, or lower batch_size if memory was short"


def scores(texts: Sequence[str], settings: Classifier, call: Call = in_process) -> list[float]:
    """Raises ClassifierFailed."""
    size = settings.batch_size
    batches = [texts[start : start + size] for start in range(0, len(texts), size)]
    found: list[float] = []
    for batch, answer in zip(batches, call(settings, batches), strict=True):
        if isinstance(answer, str):
            raise ClassifierFailed(answer)
        if answer.shape != (len(batch),):
            given = f"{len(answer):,} scores" if answer.ndim == 1 else f"an array of shape {answer.shape}"
            raise ClassifierFailed(
                f"returned {given} for {len(batch):,} texts; it has to return one for each, in order"
            )
        if not np.isfinite(answer).all():
            place = int(np.flatnonzero(~np.isfinite(answer))[0])
            shown = " ".join(batch[place].split())[:60]
            raise ClassifierFailed(
                f"returned {answer[place]} for the text {shown!r}; it has to return a finite number for every text"
            )
        found += answer.tolist()
    return found


def verdict(score: float, settings: Classifier) -> str:
    """The threshold that the document fails, or ''."""
    if settings.min_score is not None and score < settings.min_score:
        return "min_score"
    return "max_score" if settings.max_score is not None and score > settings.max_score else ""


def refused(where: str, settings: Classifier, why: ClassifierFailed, unit: str = "") -> ConfigError:
    """`where`: what has the rules, such as corpus.sources[0]."""
    return ConfigError(
        f"{where}.rules.classifier.function: {settings.function} {why}" + (f" (unit {unit})" if unit else "")
    )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
