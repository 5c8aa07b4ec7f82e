"""Stops a preparation of which a rule drops nearly all of a source: thresholds for prose on a source of code, say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from data_prep.quarantine_share import JUDGED_FROM
from pipeline.config.load import ConfigError
from pipeline.config.rules import Rules
from pipeline.config.schema import SourceConfig

SHOWN = 3  # documents that a message names


class DroppedShare:
    """Of each source and rule, fed with the manifests of its units as they come."""

    def __init__(self, sources: Sequence[SourceConfig], most: float) -> None:
        self._names, self._most = [source.name for source in sources], most
        self._documents: Counter[str] = Counter()
        self._dropped: dict[str, Counter[str]] = {name: Counter() for name in self._names}
        self._examples: dict[tuple[str, str], list[str]] = {}

    def add(self, unit: dict[str, Any]) -> None:
        """Raises ConfigError if a rule now has dropped more than `corpus.max_dropped_fraction` of the unit's source."""
        source = unit["source"]
        self._documents[source] += unit["counts"]["docs_in"]
        self._dropped[source].update({name: n for name, n in unit["counts"]["filtered"].items() if is_of_a_rule(name)})
        for name, locations in unit["examples"].items():
            shown = self._examples.setdefault((source, name), [])
            shown += locations[: SHOWN - len(shown)]
        if self._documents[source] >= JUDGED_FROM:
            self._judge(source)

    def end(self) -> None:
        """All units are in: judge the small sources as well."""
        for source in self._names:
            self._judge(source)

    def _judge(self, source: str) -> None:
        documents = self._documents[source]
        for name, dropped in self._dropped[source].most_common(1):
            if dropped > self._most * documents:
                rule, _, threshold = name.partition(".")
                where = f"corpus.sources[{self._names.index(source)}].rules.{rule}"
                raise ConfigError(
                    f"corpus.max_dropped_fraction {self._most:g}: {name} drops {dropped:,} of the first {documents:,} documents of source "
                    f"{source!r}, such as {', '.join(self._examples.get((source, name), []))}; loosen {where}.{threshold}, switch the rule "
                    f"off there ({rule}: false), or raise the limit; `moonlight data sample` shows what is dropped"
                )


def is_of_a_rule(name: str) -> bool:
    """Whether a name among the filtered ones is a rule's: rule.threshold."""
    return name.partition(".")[0] in Rules.model_fields
