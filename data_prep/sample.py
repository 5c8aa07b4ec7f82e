"""What filters and rules would do to a source, seen on about a thousand of its documents, before anything is prepared.

Of each rule's thresholds: how many documents it drops in the rules' order, and how many the rule would drop if it were the only one.
Documents come from files in hash order, a few of each, so that a source that is sorted is not judged by its beginning.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data_prep.contamination.apply import decontaminate
from data_prep.contamination.finder import Finder
from data_prep.filters import rejected_by
from data_prep.formats import format_of
from data_prep.listing import Listing, hash_order
from data_prep.near.signatures import bands
from data_prep.paragraphs.parts import parts
from data_prep.plan import Slice
from data_prep.readers import ReaderSettings, Record, read_slice
from data_prep.rules.apply import Outcome, apply
from data_prep.rules.check import check_classifiers, check_rules
from data_prep.rules.classifier import ClassifierFailed, refused
from data_prep.tokenize_unit import open_input
from pipeline.config.rules import Rules
from pipeline.config.schema import DuplicateParagraphs, NearDuplicates, RunConfig, SourceConfig
from pipeline.tokenizer.chat import said

DOCUMENTS = 1000  # of a source
FILES = 20  # of a source whose files hold many documents
BYTES = 16_000_000  # of text, of a source


@dataclass
class Sampled:
    """What was seen of one source."""

    source: SourceConfig
    rules: Rules  # those of the source, or all that there are where it has none
    files: int
    all_files: int
    records: list[Record] = field(default_factory=list)  # that filters leave
    outcomes: list[Outcome] = field(default_factory=list)  # of these
    filtered: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    alone: Counter[str] = field(default_factory=Counter)  # by rule
    languages: Counter[str] = field(default_factory=Counter)  # of all records, where they are asked for
    held: dict[str, list[int]] = field(default_factory=dict)  # of each task the numbers of records that hold a question

    @property
    def seen(self) -> int:
        return len(self.records) + self.filtered.total() + self.quarantined.total()

    @property
    def kept(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if not outcome.rejected]

    def dropped(self) -> Counter[str]:
        return Counter(outcome.rejected for outcome in self.outcomes if outcome.rejected)

    def changes(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for outcome in self.kept:
            total.update(outcome.changes)
        return total

    def scores(self) -> list[float]:
        """By the classifier, of what came that far."""
        return [outcome.score for outcome in self.outcomes if outcome.score is not None]


def sample(config: RunConfig, index: int, files: Listing, rules: Rules, finder: Finder | None = None) -> Sampled:
    """Of `corpus.sources[index]`. `finder`: of the questions of tasks, where they are looked for. Raises ConfigError where a rule needs what
    is not installed, and for what a classifier does."""
    source = config.corpus.sources[index]
    check_rules(config.corpus)
    check_classifiers(config.corpus)
    some = sorted((file for file in files if file.bytes), key=lambda file: hash_order(file.path))
    some = some[: DOCUMENTS if some and format_of(some[0].path, source.format) == "text" else FILES]
    found = Sampled(source, rules, len(some), len(files))
    reader = ReaderSettings.of(source, config.corpus.max_document_bytes)
    size = 0
    for place, file in enumerate(some):
        share = -(-(DOCUMENTS - found.seen) // (len(some) - place))
        with open_input(files.root, file.path, config.storage) as handle:
            part = Slice(file.path, file.bytes, file.identity)
            for record in itertools.islice(read_slice(part, handle, reader), share):
                if record.reason:
                    found.quarantined[record.reason] += 1
                elif rejection := record.rejected or rejected_by(
                    record.text, source.filters, conversation=source.conversations
                ):
                    found.filtered[rejection] += 1
                else:
                    found.records.append(record)
                    size += len(record.text)
        if size > BYTES:
            found.files = place + 1
            break
    if not source.conversations:
        try:
            _apply_rules(found, rules)
        except ClassifierFailed as error:
            assert rules.classifier is not None
            raise refused(f"corpus.sources[{index}]", rules.classifier, error) from None
    if finder is not None:
        _look_for_questions(found, finder)
    return found


def _apply_rules(found: Sampled, rules: Rules) -> None:
    texts = [record.text.decode() for record in found.records]
    found.outcomes = apply(texts, rules)
    for name in Rules.model_fields:
        if (rule := getattr(rules, name)) is not None:
            only = apply(texts, Rules(**{name: rule}))
            found.alone[name] = sum(bool(outcome.rejected) for outcome in only)
            found.languages.update(outcome.language for outcome in only if outcome.language)


def _look_for_questions(found: Sampled, finder: Finder) -> None:
    """In what the source's own rules leave, as prepare does."""
    texts: dict[int, str] = {}
    for number, record in enumerate(found.records):
        if found.source.conversations:
            texts[number] = said(record.text)
        elif not found.source.rules.any:
            texts[number] = record.text.decode()
        elif not found.outcomes[number].rejected:
            texts[number] = found.outcomes[number].text
    numbers = list(texts)
    for place, outcome in decontaminate(list(texts.values()), finder).items():
        for task in outcome.tasks:
            found.held.setdefault(task, []).append(numbers[place])


def repeated(samples: Sequence[Sampled], settings: DuplicateParagraphs) -> list[tuple[int, str]]:
    """Paragraphs or lines that several of the documents have that are kept: (documents more than one, text), most frequent first."""
    documents: Counter[str] = Counter()
    for each in samples:
        for outcome in each.kept:
            documents.update({part for _, part in parts(outcome.text, settings)})
    return [(count - 1, part) for part, count in documents.most_common() if count > 1]


def clusters(samples: Sequence[Sampled], settings: NearDuplicates) -> list[list[tuple[str, str]]]:
    """Near-duplicates among the documents that are kept: (source, location) of each of a cluster, largest first."""
    names = [
        (each.source.name, record.location)
        for each in samples
        for record, outcome in zip(each.records, each.outcomes)
        if not outcome.rejected
    ]
    found = bands([outcome.text for each in samples for outcome in each.kept], settings)
    parent = list(range(len(names)))

    def root(number: int) -> int:
        while parent[number] != number:
            number = parent[number]
        return number

    for band in found.hashes.T:
        _, first = np.unique(band, return_inverse=True)
        seen: dict[int, int] = {}
        for number, group in zip(found.documents.tolist(), first.tolist()):
            other = root(seen.setdefault(group, number))
            parent[max(root(number), other)] = min(root(number), other)
    grouped: dict[int, list[tuple[str, str]]] = {}
    for number, name in enumerate(names):
        grouped.setdefault(root(number), []).append(name)
    return sorted((group for group in grouped.values() if len(group) > 1), key=len, reverse=True)
