"""The name of a dataset: a digest of what decides its bytes, the files of its corpus among them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping

from data_prep.listing import Listing, list_source
from data_prep.pack_unit import layout
from data_prep.plan import FORMAT_VERSION, unit_settings
from data_prep.tokenizer_stage import tokenizer_identity
from pipeline.config.schema import RunConfig
from pipeline.manifest import digest_of

LIBRARIES = ("pyarrow", "gigatoken", "tokenizers")  # whose versions decide bytes


def list_corpus(config: RunConfig) -> dict[str, Listing]:
    """The files of every source. Raises ConfigError as `list_source` does."""
    return {
        source.name: list_source(source, index, config.storage) for index, source in enumerate(config.corpus.sources)
    }


def identity(config: RunConfig, listings: Mapping[str, Listing]) -> str:
    """Digest of the listing and of every setting that decides the dataset: known in seconds, without doing the work."""
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
    corpus = config.corpus
    alike = corpus.near_duplicates is not None or corpus.duplicate_paragraphs is not None
    if corpus.drop_duplicates_across_sources or alike:  # then their order decides which of two copies stays
        parts["order_of_sources"] = [source.name for source in corpus.sources]
    if corpus.drop_duplicates_across_sources and alike:  # alone the order says it: names that were given stay
        parts["drop_duplicates_across_sources"] = True
    if alike and config.data.packing == "whole":
        parts["too_long_for_a_row"] = "stays last"
    return digest_of(parts)[:32]


def settings_digest(config: RunConfig) -> str:
    """Digest of every setting that decides the dataset, whatever files are in the corpus."""
    return identity(config, {})


def versions() -> dict[str, str]:
    """Of the format and of the libraries that decide bytes."""
    return {"format": str(FORMAT_VERSION), **{name: importlib.metadata.version(name) for name in LIBRARIES}}
