"""Which questions stand in which documents of a batch, and at which words.

The questions' n-grams are hashes in order, with the parts and places that have them. Of a batch, words are normalised and hashed at once,
every n-gram's hash asks a table of bits (most are in no question), and what passes is looked up: linear in the text, whatever the
number of questions. Under rule ngram a part shorter than n words counts as one n-gram of its own length.

n-grams of more than `max_questions` questions are phrases of a task and ignored, as GPT-3's authors ignore n-grams that are in more than
ten training documents: theirs depends on the whole corpus, and a new file would change the verdict on an old one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from data_prep.contamination.questions import Questions
from data_prep.near.signatures import groups, word_hashes
from data_prep.rules.hashing import Hashes, ngrams
from pipeline.config.schema import Decontamination

Places = NDArray[np.int64]


@dataclass(frozen=True)
class Found:
    """Of one document: questions that stand in it, ascending, and the spans of its words that they were found by."""

    questions: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]  # [start, stop) in words; ascending, apart


@dataclass(frozen=True)
class _Grams:
    """All n-grams of one length: gram i is in `part[first[i]:first[i + 1]]`, at word `place[...]` of these."""

    n: int
    hashes: Hashes  # ascending
    first: Places
    part: Places
    place: Places
    bits: NDArray[np.bool_]
    shift: np.uint64

    def find(self, hashes: Hashes) -> tuple[Places, Places]:
        """(places in `hashes`, their grams)."""
        maybe = np.flatnonzero(self.bits[hashes >> self.shift])
        gram = np.searchsorted(self.hashes, hashes[maybe])
        gram = np.minimum(gram, len(self.hashes) - 1)
        same = self.hashes[gram] == hashes[maybe]
        return maybe[same], gram[same]


class Finder:
    def __init__(self, questions: Questions, settings: Decontamination) -> None:
        self.questions, self.settings = questions, settings
        self._sizes = np.diff(questions.first)
        least = max(settings.n, settings.min_words) if settings.rule == "span" else settings.n
        lengths = {settings.n: np.flatnonzero(self._sizes >= least)}
        if settings.rule == "ngram":
            for size in range(settings.min_words, settings.n):
                lengths[size] = np.flatnonzero(self._sizes == size)
        self._parts = np.concatenate(list(lengths.values()))  # that are looked for
        self._grams = [grams for n, parts in lengths.items() if len(parts) and (grams := self._of(n, parts))]

    @cached_property
    def looked_for(self) -> NDArray[np.bool_]:
        """Of each question, whether one of its parts is long enough."""
        found = np.zeros(len(self.questions), bool)
        found[self.questions.owner[self._parts]] = True
        return found

    def find(self, texts: Sequence[str]) -> dict[int, Found]:
        """By the text's number; texts without a question are not in it."""
        return {first + number: each for first, group in groups(texts) for number, each in self._find(group).items()}

    def _of(self, n: int, parts: Places) -> _Grams | None:
        first, owner = self.questions.first, self.questions.owner
        every = ngrams(self.questions.words, n)
        counts = self._sizes[parts] - n + 1
        part = np.repeat(parts, counts)
        place = np.arange(len(part)) - np.repeat(np.cumsum(counts) - counts, counts)
        hashes = every[first[part] + place]
        order = np.lexsort((place, part, hashes))
        hashes, part, place = hashes[order], part[order], place[order]
        edges = np.append(np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1])), len(hashes))
        of_question = np.append(True, (hashes[1:] != hashes[:-1]) | (owner[part][1:] != owner[part][:-1]))
        questions = np.add.reduceat(of_question.astype(np.int64), edges[:-1])
        rare = questions <= self.settings.max_questions
        kept = np.repeat(rare, np.diff(edges))
        sizes = np.diff(edges)[rare]
        if not len(sizes):
            return None
        unique = hashes[edges[:-1]][rare]
        width = min(26, max(10, len(unique).bit_length() + 4))
        shift = np.uint64(64 - width)
        bits = np.zeros(1 << width, bool)
        bits[unique >> shift] = True
        return _Grams(n, unique, np.concatenate([[0], np.cumsum(sizes)]), part[kept], place[kept], bits, shift)

    def _find(self, texts: Sequence[str]) -> dict[int, Found]:
        words, first = word_hashes(texts)
        at, part, place, length = [], [], [], []
        for grams in self._grams:
            # a gram that lies in two documents is no gram
            where, gram = grams.find(ngrams(words, grams.n))
            document = np.searchsorted(first, where, side="right") - 1
            inside = where + grams.n <= first[document + 1]
            where, gram = where[inside], gram[inside]
            counts = grams.first[gram + 1] - grams.first[gram]
            entries = (
                np.repeat(grams.first[gram], counts)
                + np.arange(counts.sum())
                - np.repeat(np.cumsum(counts) - counts, counts)
            )
            at.append(np.repeat(where, counts))
            part.append(grams.part[entries])
            place.append(grams.place[entries])
            length.append(np.full(len(entries), grams.n))
        if not at or not sum(map(len, at)):
            return {}
        starts, parts, places, lengths = map(np.concatenate, (at, part, place, length))
        document = np.searchsorted(first, starts, side="right") - 1
        found: dict[int, Found] = {}
        for number in np.unique(document).tolist():
            mine = document == number
            here = self._in_document(starts[mine] - first[number], parts[mine], places[mine], lengths[mine])
            if here is not None:
                found[number] = here
        return found

    def _in_document(self, at: Places, part: Places, place: Places, length: Places) -> Found | None:
        if self.settings.rule == "span":
            enough = [one for one in np.unique(part).tolist() if self._covers(one, place[part == one])]
            chosen = np.isin(part, enough)
            at, part, length = at[chosen], part[chosen], length[chosen]
            if not len(at):
                return None
        questions = np.unique(self.questions.owner[part])
        return Found(tuple(questions.tolist()), _joined(at, length))

    def _covers(self, part: int, places: Places) -> bool:
        """Whether n-grams at these places cover enough of the part's words."""
        covered = np.zeros(self._sizes[part] + 1, np.int64)
        starts = np.unique(places)
        covered[starts] += 1
        np.subtract.at(covered, starts + self.settings.n, 1)
        share = int((np.cumsum(covered)[:-1] > 0).sum()) / int(self._sizes[part])
        return share >= self.settings.least_covered


def _joined(at: Places, length: Places) -> tuple[tuple[int, int], ...]:
    """Spans that overlap or touch are one."""
    spans = list[tuple[int, int]]()
    for start, stop in sorted(set(zip(at.tolist(), (at + length).tolist()))):
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(stop, spans[-1][1]))
        else:
            spans.append((start, stop))
    return tuple(spans)
