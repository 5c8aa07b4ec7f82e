"""The name of a dataset: a digest of what decides its bytes, the files of its corpus among them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from data_prep.listing import Listing, list_source
from data_prep.pack_unit import LAYOUT_KEYS, layout
from data_prep.plan import FORMAT_VERSION, unit_settings
from data_prep.tokenizer_stage import tokenizer_identity
from pipeline.config.schema import RunConfig
from pipeline.manifest import digest_of

LIBRARIES = ("pyarrow", "gigatoken", "tokenizers")  # whose versions decide bytes
DECIDE_NO_BYTES: dict[
    str, Any
] = {  # of corpus: what names the files, what orders training, what only refuses; rules are the sources'
    "sources": {"__all__": {"path", "include", "exclude", "max_bytes", "weight", "max_epochs"}},
    **dict.fromkeys(("mixture", "max_quarantined_fraction", "max_dropped_fraction", "rules"), True),
    "decontamination": {"tasks"},  # the questions do
}


def list_corpus(config: RunConfig) -> dict[str, Listing]:
    """The files of every source. Raises ConfigError as `list_source` does."""
    return {
        source.name: list_source(source, index, config.storage) for index, source in enumerate(config.corpus.sources)
    }


def identity(config: RunConfig, listings: Mapping[str, Listing]) -> str:
    """Digest of the listing and of every setting that decides the dataset: known in seconds, without doing the work."""
    return digest_of(_parts(config, listings) | _said_later(config))[:32]


def settings_said_before(config: RunConfig) -> str:
    """Digest of the settings in the records of runs from before names said more: such a run keeps the dataset that it began with."""
    parts = _parts(config, {})
    for source in parts["sources"].values():
        source["settings"].pop("filters_judge", None)
    return digest_of(parts)[:32]


def _parts(config: RunConfig, listings: Mapping[str, Listing]) -> dict[str, Any]:
    sources = {}
    for source in config.corpus.sources:
        settings = unit_settings(source, config.corpus, "")
        settings["drop_exact_duplicates"] = source.filters.drop_exact_duplicates
        sources[source.name] = {
            "settings": settings,
            "files": listings[source.name].digest if source.name in listings else "",
        }
    parts = {
        "format_version": FORMAT_VERSION,
        "sources": sources,
        "unit_bytes": config.corpus.unit_bytes,
        "tokenizer": tokenizer_identity(config),
        "layout": layout(config.data),
        "versions": versions(),
    }
    if _order_counts(config):
        parts["order_of_sources"] = [source.name for source in config.corpus.sources]
    return parts


def _said_later(config: RunConfig) -> dict[str, Any]:
    """What names did not say at first. Without any of it they stay."""
    parts: dict[str, Any] = {}
    if config.corpus.drop_duplicates_across_sources and _finds_alike(config):  # alone the order says it
        parts["drop_duplicates_across_sources"] = True
    if _finds_alike(config) and config.data.packing == "whole":
        parts["too_long_for_a_row"] = "stays last"
    return parts


def settings_digest(config: RunConfig) -> str:
    """Digest of what the configuration says of the dataset: whatever files are in the corpus, and whichever code and libraries read them."""
    corpus = config.corpus.model_dump(mode="json", exclude_defaults=True, exclude=DECIDE_NO_BYTES)
    parts: dict[str, Any] = {
        "sources": {source["name"]: source for source in corpus.pop("sources")},
        "corpus": corpus,
        "layout": config.data.model_dump(mode="json", exclude_defaults=True, include=set(LAYOUT_KEYS)),
        "tokenizer": tokenizer_identity(config),
    }
    if _order_counts(config):
        parts["order_of_sources"] = [source.name for source in config.corpus.sources]
    return digest_of(parts)[:32]


def _finds_alike(config: RunConfig) -> bool:
    return config.corpus.near_duplicates is not None or config.corpus.duplicate_paragraphs is not None


def _order_counts(config: RunConfig) -> bool:
    """Whether the order of sources decides which of two copies stays."""
    return config.corpus.drop_duplicates_across_sources or _finds_alike(config)


def versions() -> dict[str, str]:
    """Of the format and of the libraries that decide bytes."""
    return {"format": str(FORMAT_VERSION), **{name: importlib.metadata.version(name) for name in LIBRARIES}}
