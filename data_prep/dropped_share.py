"""Stops a preparation of which a rule drops nearly all of a source: thresholds for prose on a source of code, say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.contamination.apply import RULE
from data_prep.source_share import SourceShare
from pipeline.config.languages import is_of_one
from pipeline.config.load import ConfigError
from pipeline.config.rules import Rules
from pipeline.config.schema import SourceConfig

SHOWN = 3  # documents that a message names


class DroppedShare(SourceShare):
    """Of the documents that one rule drops; `corpus.max_dropped_fraction`."""

    def __init__(self, sources: Sequence[SourceConfig], most: float) -> None:
        super().__init__(sources, most)
        keeps = {
            source.name: rule.keep for source in sources if (rule := source.rules.languages) is not None and rule.keep
        }
        files = Counter(_files(source) for source in sources if source.name in keeps)
        self._by_language = {
            source.name
            for source in sources
            if source.name in keeps and (is_of_one(source.name, keeps[source.name]) or files[_files(source)] > 1)
        }  # what they drop was never meant for them: of the same files each keeps its languages, by `languages` or by hand
        self._examples: dict[tuple[str, str], list[str]] = {}

    def _counted(self, unit: dict[str, Any]) -> Mapping[str, int]:
        for name, locations in unit["examples"].items():
            shown = self._examples.setdefault((unit["source"], name), [])
            shown += locations[: SHOWN - len(shown)]
        filtered = unit["counts"]["filtered"].items()
        meant = {"languages.keep"} if unit["source"] in self._by_language else set()
        return {name: count for name, count in filtered if is_of_a_rule(name) and name not in meant}

    def _judge(self, source: str) -> None:
        documents = self._documents[source]
        for name, dropped in self._reasons[source].most_common(1):
            if dropped > self._most * documents:
                rule, _, threshold = name.partition(".")
                if rule == RULE:
                    raise ConfigError(
                        f"corpus.max_dropped_fraction {self._most:g}: questions of task {threshold} are in {dropped:,} of the first {documents:,} "
                        f"documents of source {source!r}, such as {', '.join(self._examples.get((source, name), []))}; it is a copy of the task's "
                        "data: leave the source out, cut or report (corpus.decontamination.action), or raise the limit"
                    )
                where = f"corpus.sources[{self._names.index(source)}].rules.{rule}"
                raise ConfigError(
                    f"corpus.max_dropped_fraction {self._most:g}: {name} drops {dropped:,} of the first {documents:,} documents of source "
                    f"{source!r}, such as {', '.join(self._examples.get((source, name), []))}; loosen {where}.{threshold}, switch the rule "
                    f"off there ({rule}: false), or raise the limit; `moonlight data sample` shows what is dropped"
                )


def _files(source: SourceConfig) -> tuple[Any, ...]:
    return source.path, source.include, source.exclude


def is_of_a_rule(name: str) -> bool:
    """Whether a name among the filtered ones is a rule's: rule.threshold."""
    return name.partition(".")[0] in {*Rules.model_fields, RULE}
