"""Two datasets that differ have two names: every setting of the data is in a dataset's name, and in what a run knows its dataset by, or known
to decide nothing of its bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from data_prep.identity import identity, settings_digest
from pipeline.config.load import load_config
from pipeline.config.schema import Section

DECIDES_NOTHING = {
    *(
        "corpus.sources.0.path",
        "corpus.sources.0.include",
        "corpus.sources.0.exclude",
        "corpus.sources.0.max_bytes",
    ),  # the files do
    *("corpus.sources.0.weight", "corpus.sources.0.max_epochs", "corpus.mixture"),  # of the order of training
    *("corpus.max_quarantined_fraction", "corpus.max_dropped_fraction", "data.max_padding"),  # only refuse
    "corpus.decontamination.tasks",  # the questions do
    *("data.lanes", "data.window_blocks", "data.mixture_block", "data.cache_bytes"),  # of who reads
}
LEFT_OUT = object()  # of an optional section: the other value is none
EVERYTHING = """{
    sources: [{name: a, path: /a, id_field: id, text_field: text, filters: {where: ["score > 1"]}, max_bytes: 5},
              {name: b, path: /b}],
    rules: {languages: {keep: [en], min_score: 0.5}, gopher_quality: true, gopher_repetition: true, c4: true, fineweb: true,
            personal_data: true, classifier: {function: "quality:score", version: "1", min_score: 0.5, max_score: 0.9}},
    drop_duplicates_across_sources: true, near_duplicates: {}, duplicate_paragraphs: {},
    decontamination: {tasks: [arc], rule: span, ngram: 8, min_covered: 0.7, action: cut, window: 200, min_piece: 200, max_pieces: 10,
                      questions: %s}}""" % ("a" * 64)


def settings(section: Section, before: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of every setting, sections that can be left out and the first of each list among them."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        path = f"{before}{name}"
        if path == "corpus.rules":
            continue  # every source has them by now (with_rules)
        if isinstance(value, tuple) and value and isinstance(value[0], Section):
            yield from settings(value[0], f"{path}.0.")
            continue
        if isinstance(value, Section):
            yield from settings(value, f"{path}.")
            if type(section).model_fields[name].default is not None:
                continue
            value = LEFT_OUT
        yield path, value


def another(path: str, value: Any) -> Any:
    """A value that the setting does not have."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, tuple):
        return (*value, "more")
    if value is LEFT_OUT:
        return None
    return 1 if value is None else f"{value}x"


def changed(section: Any, path: list[str], value: Any) -> Any:
    first, *rest = path
    if isinstance(section, tuple):
        return (changed(section[0], rest, value), *section[1:])
    inner = changed(getattr(section, first), rest, value) if rest else value
    return section.model_copy(update={first: inner})


@pytest.mark.parametrize("without", ["", "near_duplicates", "duplicate_paragraphs", "drop_duplicates_across_sources"])
@pytest.mark.parametrize("section", ["corpus", "data"])
def test_every_setting_is_in_the_name_or_known_to_decide_nothing(section: str, without: str) -> None:
    overrides = [f"corpus={EVERYTHING}", "storage.root=/store"]
    if without:
        overrides.append(f"corpus.{without}={'false' if without.startswith('drop') else 'null'}")
    config = load_config("debug", overrides)
    name, said = identity(config, {}), settings_digest(config)
    wrong, tried = [], 0
    for path, value in settings(getattr(config, section), f"{section}."):
        if value is None and path == f"corpus.{without}":
            continue  # with it is the first case
        other = changed(config, path.split("."), another(path, value))
        for same in (identity(other, {}) == name, settings_digest(other) == said):
            if same != (path in DECIDES_NOTHING):
                wrong.append(path)
        tried += 1
    assert not wrong
    assert tried > 10
