"""All rules of a source over a batch of documents, in this order: language, Gopher's repetition and quality, C4 (which removes lines),
FineWeb's (on what C4 left), a classifier of one's own, personal data (which is replaced). A document is dropped, and counted, by the first rule that it fails.

A pure function of texts and settings, so a unit that is done again has the same bytes. Changes come before the document's hash:
two documents that are equal after them are exact duplicates. Where languages are only counted, they are looked for in what is kept alone:
finding one costs as much as all other rules together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.rules import c4, classifier, fineweb, gopher_quality, gopher_repetition, language, personal_data
from data_prep.rules.group import Group
from data_prep.rules.words import groups
from pipeline.config.rules import Rules


@dataclass
class Outcome:
    """What became of one document."""

    text: str
    rejected: str = ""  # rule.threshold: the name it is counted under
    changes: Counter[str] = field(default_factory=Counter)  # to a document that is kept, by name
    language: str = (
        ""  # of the text as it was, if it was asked for; where languages are only counted, of one that is kept
    )
    score: float | None = None  # by the classifier, if it came that far


def apply(texts: Sequence[str], rules: Rules, classify: classifier.Call = classifier.in_process) -> list[Outcome]:
    """Of each text, in order. `classify`: where the classifier runs. Raises ClassifierFailed."""
    outcomes = [Outcome(text) for text in texts]
    decides = rules.languages is not None and (rules.languages.keep or rules.languages.min_score)
    if rules.languages and decides:
        for outcome in outcomes:
            outcome.language, score = language.identify(outcome.text)
            _reject([outcome], "languages", [language.verdict(outcome.language, score, rules.languages)])
    left = [outcome for outcome in outcomes if not outcome.rejected]
    for numbers in groups([outcome.text for outcome in left]):
        _apply([left[number] for number in numbers], rules)
    if rules.classifier:
        left = [outcome for outcome in left if not outcome.rejected]
        scores = classifier.scores([outcome.text for outcome in left], rules.classifier, classify)
        for outcome, score in zip(left, scores):
            outcome.score = score
            _reject([outcome], "classifier", [classifier.verdict(score, rules.classifier)])
    if rules.personal_data:
        for outcome in left:
            if not outcome.rejected:
                outcome.text, found = personal_data.replaced(outcome.text, rules.personal_data)
                outcome.changes.update({f"personal_data.{kind}": count for kind, count in found.items()})
    if rules.languages and not decides:
        for text, outcome in zip(texts, outcomes):
            if not outcome.rejected:
                outcome.language, _ = language.identify(text)
    return outcomes


def _apply(outcomes: list[Outcome], rules: Rules) -> None:
    group = Group([outcome.text for outcome in outcomes])
    if rules.gopher_repetition:
        _reject(outcomes, "gopher_repetition", gopher_repetition.verdicts(group, rules.gopher_repetition))
    if rules.gopher_quality:
        _reject(outcomes, "gopher_quality", gopher_quality.verdicts(group, rules.gopher_quality))
    left = [outcome for outcome in outcomes if not outcome.rejected]
    changed = False
    if rules.c4:
        for outcome in left:
            verdict, outcome.text, removed = c4.cleaned(outcome.text, rules.c4)
            _reject([outcome], "c4", [verdict])
            if removed and not verdict:
                outcome.changes["c4.lines"] += removed
        left, changed = [outcome for outcome in left if not outcome.rejected], True
    if rules.fineweb and left:
        group = Group([outcome.text for outcome in left]) if changed or len(left) < len(outcomes) else group
        _reject(left, "fineweb", fineweb.verdicts(group, rules.fineweb))


def _reject(outcomes: list[Outcome], rule: str, verdicts: list[str]) -> None:
    for outcome, verdict in zip(outcomes, verdicts):
        if verdict and not outcome.rejected:
            outcome.rejected = f"{rule}.{verdict}"
