"""What a language of a source drops is what it was named for; what a rule for languages drops of a whole source is judged."""

from __future__ import annotations

import json

import pytest

from data_prep.dropped_share import DroppedShare
from pipeline.config.load import ConfigError, load_config

UNIT = {
    "failed": "",
    "counts": {"docs_in": 2000, "filtered": {"languages.keep": 1900}},
    "examples": {"languages.keep": ["a.jsonl@0"]},
}


def judged(*sources: dict[str, object]) -> None:
    found = load_config("debug", [f"corpus={json.dumps({'sources': sources})}"]).corpus.sources
    share = DroppedShare(found, 0.9)
    for source in found:
        share.add(UNIT | {"source": source.name})
    share.end()


@pytest.mark.parametrize("languages", [{"de": 1}, {"de": 1, "en": 3}])
def test_languages_of_a_source_drop_the_others(languages: dict[str, float]) -> None:
    judged({"name": "web", "path": "/web", "languages": languages})


def test_languages_that_sources_of_the_same_files_share_by_hand_drop_the_others() -> None:
    keep = {name: {"languages": {"keep": [code]}} for name, code in (("english", "en"), ("german", "de"))}
    judged(*({"name": name, "path": "/web", "rules": rules} for name, rules in keep.items()))


def test_a_rule_for_languages_is_judged_though_another_source_has_the_same_folder() -> None:
    rule = {"languages": {"keep": ["de"]}}
    with pytest.raises(ConfigError, match=r"languages\.keep drops 1,900 of the first 2,000 documents of source 'web'"):
        judged({"name": "web", "path": "/web", "rules": rule}, {"name": "other", "path": "/web", "include": ["*.txt"]})
