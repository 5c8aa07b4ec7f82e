"""What becomes of documents that hold questions: dropped, cut as GPT-3's authors cut theirs, or only counted.

Cutting removes the span and `window` characters on either side. Rests of fewer than `min_piece` characters go, the others stay one
document with an empty line between them (theirs became documents of their own); one that would fall into more than `max_pieces` is
dropped, and so is one of which nothing is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data_prep.contamination.finder import Finder, Found
from data_prep.contamination.questions import read_questions
from data_prep.near.signatures import word_hashes, word_places
from pipeline.config.schema import Decontamination, StorageConfig
from pipeline.manifest import FileEntry
from pipeline.storage import open_storage

RULE = "decontamination"


@dataclass(frozen=True)
class Outcome:
    """Of a document with questions."""

    text: str | None  # what is left; None: the document is dropped
    questions: tuple[int, ...]
    tasks: tuple[str, ...]  # of these
    cuts: int = 0

    @property
    def name(self) -> str:
        """That it is counted under, if it is dropped."""
        return f"{RULE}.{self.tasks[0]}"


@lru_cache(maxsize=1)
def load_finder(storage: StorageConfig, entry: FileEntry, settings: Decontamination) -> Finder:
    """One per process. Raises DamagedFile."""
    return Finder(read_questions(open_storage(storage), entry), settings)


def decontaminate(texts: Sequence[str], finder: Finder, *, may_cut: bool = True) -> dict[int, Outcome]:
    """By the text's number; texts without a question are not in it. Without `may_cut` (a conversation has no rests) action cut drops."""
    found = finder.find(texts)
    action = finder.settings.action
    if action == "cut" and not may_cut:
        action = "drop"
    return {number: _outcome(texts[number], each, finder, action) for number, each in found.items()}


def _outcome(text: str, found: Found, finder: Finder, action: str) -> Outcome:
    questions = finder.questions
    tasks = tuple(questions.tasks[number] for number in np.unique(questions.task[list(found.questions)]))
    if action == "report":
        return Outcome(text, found.questions, tasks)
    left = cut(text, found.spans, finder.settings) if action == "cut" else None
    return Outcome(left, found.questions, tasks, len(found.spans) if left is not None else 0)


def cut(text: str, spans: Sequence[tuple[int, int]], settings: Decontamination) -> str | None:
    """The text without spans of its words; None if it is to be dropped."""
    start, stop = word_places(text)
    if len(start) != len(word_hashes([text])[0]):  # marks that change places when they are decomposed
        return None
    window, here = settings.cut("window"), 0
    pieces = []
    for first, last in spans:
        pieces.append(text[here : max(here, int(start[first]) - window)])
        here = max(here, min(len(text), int(stop[last - 1]) + window))
    pieces.append(text[here:])
    kept = [piece for each in pieces if len(piece := each.strip()) >= max(1, settings.cut("min_piece"))]
    return "\n\n".join(kept) if kept and len(pieces) <= settings.cut("max_pieces") else None
