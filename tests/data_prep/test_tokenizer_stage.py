"""What decides the tokenizer of a corpus, and what does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.identity import identity, list_corpus
from data_prep.listing import list_source
from data_prep.tokenizer_stage import ensure_tokenizer, sample, tokenizer_sources
from pipeline.config.load import ConfigError
from pipeline.config.schema import MixtureStage, RunConfig
from pipeline.manifest import TokenizerManifest
from pipeline.storage import open_storage

Make = Callable[..., RunConfig]


@pytest.fixture
def sources(tmp_path: Path, texts: list[str]) -> dict[str, dict[str, Any]]:
    """Three sources of a file each."""
    made = {}
    for number, name in enumerate(("code", "prose", "late")):
        folder = tmp_path / name
        folder.mkdir()
        lines = [json.dumps({"text": text}) for text in texts[number * 30 : number * 30 + 30]]
        (folder / "all.jsonl").write_text("\n".join(lines) + "\n")
        made[name] = {"name": name, "path": str(folder)}
    return made


def config_of(make: Make, *sources: dict[str, Any], **changes: Any) -> RunConfig:
    corpus = {"sources": sources, "heldout_fraction": 0.1, "heldout_max_documents": 5}
    return make("unused", corpus=json.dumps(corpus), **changes)


def tokenizer_of(config: RunConfig) -> TokenizerManifest:
    listings = {
        source.name: list_source(source, index, config.storage) for index, source in enumerate(config.corpus.sources)
    }
    return ensure_tokenizer(config, open_storage(config.storage), listings)


def test_settings_of_the_mixture_decide_neither_tokenizer_nor_dataset(run_config: Make, sources: dict) -> None:
    code, prose = sources["code"], sources["prose"]
    first = config_of(run_config, code, prose)
    tokenizer, name = tokenizer_of(first), identity(first, list_corpus(first))
    mixture = (MixtureStage(until_tokens=1000, weights={"code": 0.1, "prose": 0.9}),)
    for changed in (
        config_of(run_config, code | {"weight": 9.0}, prose),
        config_of(run_config, code | {"max_epochs": 3.0}, prose | {"weight": 0.1}),
        first.model_copy(update={"corpus": first.corpus.model_copy(update={"mixture": mixture})}),
    ):
        assert tokenizer_of(changed) == tokenizer
        assert identity(changed, list_corpus(changed)) == name


def test_a_filter_that_the_sample_does_not_see_keeps_the_tokenizer(run_config: Make, sources: dict) -> None:
    first = tokenizer_of(config_of(run_config, sources["code"]))
    for filters, same in (({"drop_exact_duplicates": False}, True), ({"min_characters": 4000}, False)):
        changed = tokenizer_of(config_of(run_config, sources["code"] | {"filters": filters}))
        assert (changed == first) == same


def test_a_new_source_keeps_the_tokenizer(run_config: Make, sources: dict) -> None:
    first = tokenizer_of(config_of(run_config, sources["code"], sources["prose"]))
    assert tokenizer_of(config_of(run_config, *sources.values())) == first
    assert tokenizer_of(config_of(run_config, sources["code"])) != first  # it has lost what the first was trained on


def test_languages_of_a_source_are_sampled_once(run_config: Make, sources: dict) -> None:
    """They are in the same files: each by itself would give the same texts again in place of others."""
    alone, split = (
        config_of(run_config, sources["code"] | more, sources["prose"], tokenizer__sources=json.dumps(shares))
        for more, shares in (
            ({}, {"code": 3, "prose": 1}),
            ({"languages": {"en": 3, "de": 1}}, {"code-en": 1, "code-de": 2, "prose": 1}),
        )
    )
    found = list(sample(split, list_corpus(split)))
    assert found == list(sample(alone, list_corpus(alone)))
    assert len(set(found)) == len(found) > 10


def test_only_named_sources_train_it(run_config: Make, sources: dict) -> None:
    named = json.dumps({"vocab_size": 600, "training_bytes": 200_000, "sources": {"code": 1.0}})
    first = config_of(run_config, sources["code"], sources["prose"], tokenizer=named)
    other = config_of(
        run_config, sources["late"] | {"filters": {"min_characters": 9}}, sources["code"], tokenizer=named
    )
    assert (
        tokenizer_of(first)
        == tokenizer_of(other)
        == tokenizer_of(config_of(run_config, sources["code"], tokenizer=named))
    )
    shares = json.dumps({"vocab_size": 600, "training_bytes": 40_000, "sources": {"code": 3.0, "prose": 1.0}})
    config = config_of(run_config, sources["code"], sources["prose"], tokenizer=shares)
    assert tokenizer_sources(config) == {"code": 0.75, "prose": 0.25}
    listings = {source.name: list_source(source, 0, config.storage) for source in config.corpus.sources}
    assert sum(len(text.encode()) for text in sample(config, listings)) == pytest.approx(40_000, abs=16)
    with pytest.raises(ConfigError, match=r"tokenizer\.sources: no source of the corpus is named 'cod'"):
        config_of(run_config, sources["code"], tokenizer=json.dumps({"vocab_size": 600, "sources": {"cod": 1.0}}))


def test_defaults_said_aloud_are_the_same_tokenizer(run_config: Make, sources: dict) -> None:
    said = {
        "vocab_size": 600,
        "training_bytes": 200_000,
        "eos_token": "[EOS]",
        "special_tokens": ["[BOS]", "[EOS]", "[PAD]", "[UNK]"],
    }
    first = tokenizer_of(config_of(run_config, sources["code"]))
    assert tokenizer_of(config_of(run_config, sources["code"], tokenizer=json.dumps(said))) == first
    assert (first.engines, first.notes) == (("gigatoken", "fastokens"), ())


def test_a_given_tokenizer_and_what_prepare_says_of_it(run_config: Make, sources: dict, tmp_path: Path) -> None:
    first = config_of(run_config, sources["code"])
    folder = Path(open_storage(first.storage).root) / tokenizer_of(first).folder
    document = json.loads((folder / "tokenizer.json").read_text())
    document["normalizer"] = {"type": "NFKC"}
    given = tmp_path / "given"
    given.mkdir()
    (given / "tokenizer.json").write_text(json.dumps(document))
    (given / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[EOS]", "chat_template": "{{ messages }}"}))
    (given / "chat_template.jinja").write_text("A{{ messages }}")
    made = tokenizer_of(config_of(run_config, sources["code"], tokenizer=json.dumps({"path": str(given)})))
    assert made.engines == ("tokenizers",)
    normalizer, cost = made.notes
    assert normalizer.startswith("tokenizer.json has a normalizer")
    assert cost.startswith(
        "encoded by tokenizers, 150 core-hours a TB of text (gigatoken: 2), because gigatoken cannot run it"
    )
    names = sorted(Path(file.path).name for file in made.files)
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    alone = json.dumps({"path": str(given / "tokenizer.json"), "eos_token": "[EOS]"})
    made = tokenizer_of(config_of(run_config, sources["code"], tokenizer=alone))
    assert any("tokenizer_config.json beside it" in note for note in made.notes)
    document["model"]["dropout"] = 0.5
    (given / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"tokenizer\.path: .*given: tokenizer\.json: model\.dropout 0\.5"):
        tokenizer_of(config_of(run_config, sources["code"], tokenizer=json.dumps({"path": str(given)})))
