"""Stops a preparation whose sources are not what their settings say, before hours are spent on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.source_share import SourceShare
from pipeline.config.load import ConfigError
from pipeline.config.schema import SourceConfig


class QuarantineShare(SourceShare):
    """Of the documents that cannot be used, and of the units that killed their worker, each of which is one record but may hold a million
    documents; `corpus.max_quarantined_fraction`."""

    def __init__(self, sources: Sequence[SourceConfig], most: float) -> None:
        super().__init__(sources, most)
        self._units: Counter[str] = Counter()
        self._failed: dict[str, list[str]] = {name: [] for name in self._names}  # why

    def add(self, unit: dict[str, Any]) -> None:
        self._units[unit["source"]] += 1
        if unit["failed"]:
            self._failed[unit["source"]].append(f"{unit['id']} {unit['failed']}")
        super().add(unit)

    def end(self) -> None:
        for source, failed in self._failed.items():
            if len(failed) > self._most * self._units[source]:
                raise ConfigError(
                    f"corpus.max_quarantined_fraction {self._most:g}: {len(failed):,} of the {self._units[source]:,} units of source {source!r} "
                    f"cannot be used (unit {failed[-1]}); find out what in their files does it (datasets/quarantine names them) and take it out, "
                    "delete their records in datasets/units to have them tried again, or raise the limit"
                )
        super().end()

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
