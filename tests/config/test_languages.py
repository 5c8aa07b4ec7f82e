"""A source that is mixed by language becomes one of each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.prepare import prepare
from pipeline.config.load import ConfigError, dump_yaml, load_config, with_absolute_paths
from pipeline.config.schema import RunConfig
from pipeline.storage import open_storage

ENGLISH = "Nobody of the crew of ship {} knew that the tide would turn with the moon, and so they waited for the others on the shore."
GERMAN = "Niemand von der Mannschaft des Schiffes {} wusste, dass die Flut sich mit dem Mond wenden würde, und so warteten sie am Ufer."


def split(path: Path | str, **more: object) -> RunConfig:
    source = {
        "name": "web",
        "path": str(path),
        "weight": 2.0,
        "languages": {"en": 3, "de": 1},
        "max_epochs": 1e6,
        **more,
    }
    corpus = {"sources": [source, {"name": "other", "path": str(path)}], "rules": {"languages": {"min_score": 0.4}}}
    return load_config("debug", [f"corpus={json.dumps(corpus)}"])


def test_a_source_of_each_language() -> None:
    config = split("/texts")
    assert [(source.name, source.weight) for source in config.corpus.sources] == [
        ("web-en", 1.5),
        ("web-de", 0.5),
        ("other", 1.0),
    ]
    rules = [source.rules.languages for source in config.corpus.sources]
    assert [(rule.keep, rule.min_score) for rule in rules if rule] == [(("en",), 0.4), (("de",), 0.4), ((), 0.4)]
    assert with_absolute_paths(config).corpus == config.corpus


def test_it_is_read_back(tmp_path: Path) -> None:
    config = split(tmp_path)
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    assert load_config(str(tmp_path / "run.yaml")).corpus == config.corpus


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (
            {"rules": {"languages": {"keep": ["fr"]}}},
            r"corpus.sources.0.languages and rules.languages: \{keep: \['fr'\]\} contradict",
        ),
        ({"rules": {"languages": False}}, "corpus.sources.0.languages and rules.languages: false contradict"),
        ({"languages": {}}, "corpus.sources.0.languages: give each language its share"),
        ({"languages": {"en": True}}, "corpus.sources.0.languages: give each language its share"),
        ({"conversations": True}, "corpus.sources.0.languages: conversations are true"),
        ({"name": "Web"}, "lower-case letters"),
        ({"weight": "much"}, "corpus.sources.0.weight"),
    ],
)
def test_contradictions(more: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        split("/texts", **more)


def test_prepared_by_language(tmp_path: Path) -> None:
    """One document in twenty is German: the limit of what a rule may drop does not judge what the other source keeps."""
    texts = [(GERMAN if number % 20 == 7 else ENGLISH).format(number) * 3 for number in range(400)]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = {"name": "web", "path": str(tmp_path / "texts"), "languages": {"en": 3, "de": 1}, "max_epochs": 1e6}
    config = load_config(
        "debug",
        [
            f"storage.root={tmp_path / 'root'}",
            f"corpus={json.dumps({'sources': [source], 'heldout_fraction': 0.0})}",
            'tokenizer={"vocab_size": 400, "training_bytes": 20000}',
            "model.vocab_size=400",
            "data.sequence_length=128",
            "training.sequence_length=128",
            "data.rows_per_group=2",
            "data.max_padding=1.0",
        ],
    )
    dataset = prepare(config, open_storage(config.storage))
    found = {source.name: (source.counts.docs_out, source.languages) for source in dataset.sources}
    assert found == {"web-en": (380, {"en": 380}), "web-de": (20, {"de": 20})}
