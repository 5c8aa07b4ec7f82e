"""Questions in documents against sets of n-grams in plain Python; what is cut; places of words in the text itself."""

from __future__ import annotations

import re
import unicodedata
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.contamination.apply import cut, decontaminate
from data_prep.contamination.finder import Finder
from data_prep.contamination.questions import parse, to_bytes
from data_prep.near.signatures import normalised, word_hashes, word_places
from data_prep.rules.hashing import POWERS, RADIX, ngrams
from pipeline.config.decontamination import Decontamination

VOCABULARY = ["moon", "Tide", "rose", "café", "42", "late", "Straße", "and", "7,5", "over", "hill", "don't"]


def plain_words(text: str) -> list[str]:
    """The normalisation by its definition: small letters, no marks, runs of digits as 0, cut at what is no letter or number."""
    letters = unicodedata.normalize("NFD", text.lower())
    letters = "".join(letter for letter in letters if unicodedata.category(letter) != "Mn")
    return re.findall(r"\w+", re.sub(r"\d+", "0", letters.replace("_", " ")))


def plain_ngrams(words: list[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[place : place + n]) for place in range(len(words) - n + 1)}


def plainly_seen(part: str, document: str, settings: Decontamination) -> bool:
    """Whether the part stands in the document by the rule; n-grams of many questions are not looked at."""
    words, theirs = plain_words(part), plain_words(document)
    if settings.rule == "ngram":
        if len(words) < settings.min_words:
            return False
        n = min(settings.n, len(words))
        return bool(plain_ngrams(words, n) & plain_ngrams(theirs, n))
    common = plain_ngrams(theirs, settings.n)
    covered = {
        place + step
        for place in range(len(words) - settings.n + 1)
        if tuple(words[place : place + settings.n]) in common
        for step in range(settings.n)
    }
    return len(words) >= max(settings.n, settings.min_words) and len(covered) >= settings.least_covered * len(words)


def finder(texts: dict[str, list[list[str]]], **given: object) -> Finder:
    """Of tasks and their questions' parts."""
    asked = {task: [(f"{task}-{i}", parts) for i, parts in enumerate(each)] for task, each in texts.items()}
    return Finder(parse(to_bytes(asked)), Decontamination(**{"tasks": tuple(texts), **given}))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"ngram": 5, "min_words": 4},
        {"rule": "span", "ngram": 4, "min_words": 4},
        {"rule": "span", "min_covered": 1.0},
    ],
    ids=str,
)
def test_as_sets_of_ngrams_have_it(given: dict[str, object]) -> None:
    """A thousand documents of twelve words, so that a lot is found, and more is nearly found."""
    rng = Random(5)

    def prose(count: int) -> str:
        return "".join(rng.choice(VOCABULARY) + rng.choice([" ", "\n", ", ", "  - "]) for _ in range(count))

    questions = {
        task: [[prose(rng.randint(2, 24)) for _ in range(rng.randint(1, 3))] for _ in range(6)] for task in "ab"
    }
    parts = [(number, part) for number, each in enumerate(questions["a"] + questions["b"]) for part in each]
    documents = []
    for _ in range(1000):
        words = re.split(r"(?<=\s)", rng.choice(parts)[1])
        start = rng.randint(0, len(words))
        piece = "".join(words[start : rng.randint(start, len(words))])
        documents.append(
            prose(rng.randint(0, 9)) + rng.choice([piece, piece.upper(), " ".join(piece.split())]) + prose(3)
        )
    made = finder(questions, max_questions=1000, **given)
    found = made.find(documents)
    expected = {
        number: tuple(sorted({owner for owner, part in parts if plainly_seen(part, document, made.settings)}))
        for number, document in enumerate(documents)
    }
    assert {number: each.questions for number, each in found.items()} == {
        number: each for number, each in expected.items() if each
    }
    assert 9 < len(found) < 950


QUESTION = (
    "Which of the moons of the outer planets keeps its face turned to the sun while the tide of the northern sea rises "
    "over the old harbour wall at noon?"
)  # 29 words
FIRST, SECOND = QUESTION[: QUESTION.index("while")], QUESTION[QUESTION.index("while") :]  # 14 and 15
NOISE = "A paragraph about something else entirely, which no examination has ever asked about. " * 5


@pytest.mark.parametrize(
    ("planted", "by_ngram", "by_span"),
    [
        (QUESTION, True, True),
        (QUESTION.upper(), True, True),
        (QUESTION.replace(" ", "\n\t "), True, True),
        (QUESTION.replace("moons", "moöns").replace("tide", "tide,"), True, True),
        (FIRST + NOISE + SECOND, True, True),  # all its words are in 8-grams of the document
        (FIRST, True, False),  # less than 70 % of them
        (SECOND, True, False),
        (" ".join(QUESTION.split()[:12]), False, False),
        (QUESTION.replace("face", "back").replace("tide", "wave").replace("old", "new"), False, False),
        (NOISE, False, False),
    ],
)
def test_planted(planted: str, by_ngram: bool, by_span: bool) -> None:
    for rule, expected in (("ngram", by_ngram), ("span", by_span)):
        made = finder({"exam": [[QUESTION]]}, rule=rule)
        assert bool(made.find([NOISE + planted + NOISE])) is expected, rule


def test_short_questions_count_as_a_whole_or_not_at_all() -> None:
    made = finder({"exam": [["one two three four five six seven eight nine"], ["too short to be looked for"]]})
    assert made.looked_for.tolist() == [True, False]
    assert list(
        made.find(["zero One, two three four five six seven eight nine.", "two three four five six seven eight nine"])
    ) == [0]


def test_phrases_of_a_task_are_ignored() -> None:
    phrase = "choose the best of the following answers to the question that is asked below and say"
    own = [f"{phrase} {' '.join(f'w{chr(97 + number)}{chr(97 + step)}' for step in range(14))}" for number in range(11)]
    made = finder({"exam": [[text] for text in own]})
    assert made.find([phrase]) == {}
    assert made.find([own[3]])[0].questions == (3,)
    assert finder({"exam": [[text] for text in own]}, max_questions=11).find([phrase])[0].questions == tuple(range(11))


def test_a_gram_over_two_documents_is_none() -> None:
    words = QUESTION.split()
    assert finder({"exam": [[QUESTION]]}).find([" ".join(words[:10]), " ".join(words[10:20])]) == {}


def test_cutting() -> None:
    filler = "".join(f"Line {chr(97 + number % 26)} of the text around it, of no interest.\n" for number in range(40))
    text = filler + QUESTION + "\n" + filler
    at = text.index(QUESTION)
    (outcome,) = decontaminate([text], finder({"exam": [[QUESTION]]}, action="cut", window=100)).values()
    assert (
        outcome.text == text[: at - 100].strip() + "\n\n" + text[at + len(QUESTION) - 1 + 100 :].strip()
    )  # the ? is no word
    assert outcome.cuts == 1
    short = filler[:150] + QUESTION + filler
    (outcome,) = decontaminate([short], finder({"exam": [[QUESTION]]}, action="cut", window=0)).values()
    assert outcome.text == ("? " + filler).replace("? ", "?", 1).strip()
    often = (filler[:600] + QUESTION + "\n") * 11
    made = finder({"exam": [[QUESTION]]}, action="cut", window=0)
    assert made.find([often])[0].questions == (0,)
    assert cut(often, made.find([often])[0].spans, made.settings) is None
    assert cut(QUESTION, ((0, 29),), made.settings) is None  # nothing is left


def test_cut_twice_finds_nothing() -> None:
    made = finder({"exam": [[QUESTION]]}, action="cut")
    rng = Random(3)
    for _ in range(20):
        parts = [rng.choice([QUESTION, QUESTION.title(), FIRST, NOISE, "Ünïcode 月亮 ﬁ "]) for _ in range(9)]
        outcome = decontaminate(["\n".join(parts)], made).get(0)
        if outcome is not None and outcome.text is not None:
            assert made.find([outcome.text]) == {}


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_places_are_those_of_the_words(text: str) -> None:
    start, stop = word_places(text)
    found, _ = word_hashes([text])
    assert len(start) == len(stop)
    assert (start < stop).all()
    assert (start[1:] >= stop[:-1]).all()
    if len(start) == len(found):  # else a document is dropped, not cut
        each = [word_hashes([text[a:b]])[0] for a, b in zip(start.tolist(), stop.tolist())]
        assert sum(map(len, each)) == len(found)
    else:
        assert any(unicodedata.combining(letter) for letter in unicodedata.normalize("NFD", text))
    if text.isascii():
        shown = [text[a:b] for a, b in zip(start.tolist(), stop.tolist())]
        assert [normalised(word) for word in shown] == normalised(text).split()


@pytest.mark.parametrize("count", [0, 1, 12, 13, 14, 5000, POWERS, POWERS + 1])
def test_sums_give_the_polynomials(count: int) -> None:
    words = np.random.default_rng(count).integers(0, 1 << 63, count, dtype=np.uint64) * np.uint64(3)
    for n in (5, 6, 13):
        found = ngrams(words, n)
        assert len(found) == max(0, count - n + 1)
        for place in {0, len(found) // 2, len(found) - 1} if len(found) else ():
            value = 0
            for word in words[place : place + n].tolist():
                value = (value * int(RADIX) + word) % (1 << 64)
            assert int(found[place]) == value
