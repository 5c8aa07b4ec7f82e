"""Documents that rules look at together, with what several of them ask for, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from data_prep.rules.hashing import Hashes
from data_prep.rules.words import Words


class Group:
    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def words(self) -> Words:
        return Words(self.texts)

    @cached_property
    def hashes(self) -> Hashes:
        """Of each word."""
        return self.words.hashes()


def fraction(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
