"""Classifiers for tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import xxhash


def score(texts: list[str]) -> np.ndarray:
    """Between 0 and 1, by the text's hash and by how many texts it is with: other batches would give other scores. The text `kill once,
    PATH` kills the process that has it first: until there is such a file."""
    for text in texts:
        if text.startswith("kill once, "):
            try:
                Path(text.split(", ")[1]).touch(exist_ok=False)
            except FileExistsError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)
    return np.array([(xxhash.xxh3_64_intdigest(text.encode()) + len(texts)) % 1000 / 1000 for text in texts])


def dies(texts: list[str]) -> np.ndarray:
    os.kill(os.getpid(), signal.SIGKILL)
    return score(texts)


def one_too_few(texts: list[str]) -> list[float]:
    return [0.5] * (len(texts) - 1)


def no_number(texts: list[str]) -> list[float]:
    return [0.5] * (len(texts) - 1) + [float("nan")]


def a_column(texts: list[str]) -> np.ndarray:
    return np.zeros((len(texts), 1))


def no_array(texts: list[str]) -> list[str]:
    return ["good"] * len(texts)


def raises(texts: list[str]) -> list[float]:
    raise KeyError("model.bin")


def versioned(texts: list[str]) -> list[float]:
    return [0.5] * len(texts)


versioned.version = "2"  # type: ignore[attr-defined]
a_constant = 3
