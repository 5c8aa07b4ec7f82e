"""Stops a preparation whose sources are not what their settings say, before hours are spent on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_prep.source_share import SourceShare
from pipeline.config.load import ConfigError


class QuarantineShare(SourceShare):
    """Of the documents that cannot be used; `corpus.max_quarantined_fraction`."""

    def _counted(self, unit: dict[str, Any]) -> Mapping[str, int]:
        counted: Mapping[str, int] = unit["counts"]["quarantined"]
        return counted

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
