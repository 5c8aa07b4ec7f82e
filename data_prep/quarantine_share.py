"""Stops a preparation whose sources are not what their settings say, before hours are spent on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pipeline.config.load import ConfigError
from pipeline.config.schema import SourceConfig

JUDGED_FROM = 1000  # documents of a source; fewer are judged at its end


class QuarantineShare:
    """Of each source, fed with the manifests of its units as they come."""

    def __init__(self, sources: Sequence[SourceConfig], most: float) -> None:
        self._names, self._most = [source.name for source in sources], most
        self._documents: Counter[str] = Counter()
        self._reasons: dict[str, Counter[str]] = {name: Counter() for name in self._names}

    def add(self, unit: dict[str, Any]) -> None:
        """Raises ConfigError if the unit's source now passes `corpus.max_quarantined_fraction`."""
        source, counts = unit["source"], unit["counts"]
        self._documents[source] += counts["docs_in"]
        self._reasons[source].update(counts["quarantined"])
        if self._documents[source] >= JUDGED_FROM:
            self._judge(source)

    def end(self) -> None:
        """All units are in: judge the small sources as well."""
        for source in self._names:
            self._judge(source)

    def _judge(self, source: str) -> None:
        documents, reasons = self._documents[source], self._reasons[source]
        if reasons.total() <= self._most * documents:
            return
        told = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common(4))
        raise ConfigError(
            f"corpus.max_quarantined_fraction {self._most:g}: of the first {documents:,} documents of source {source!r} "
            f"{reasons.total():,} cannot be used ({told}); correct corpus.sources[{self._names.index(source)}] or raise the limit; "
            "the documents are in datasets/quarantine"
        )
