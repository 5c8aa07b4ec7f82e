"""How large a part of a source may be something, judged while its units come in: what the checks of quarantine and of rules have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config.schema import SourceConfig

JUDGED_FROM = 1000  # documents of a source; fewer are judged at its end


class SourceShare:
    """Of each source, fed with the manifests of its units as they come."""

    def __init__(self, sources: Sequence[SourceConfig], most: float) -> None:
        self._names, self._most = [source.name for source in sources], most
        self._documents: Counter[str] = Counter()
        self._reasons: dict[str, Counter[str]] = {name: Counter() for name in self._names}

    def add(self, unit: dict[str, Any]) -> None:
        """Raises ConfigError if the unit's source now passes the limit."""
        source = unit["source"]
        self._documents[source] += unit["counts"]["docs_in"]
        self._reasons[source].update(self._counted(unit))
        if self._documents[source] >= JUDGED_FROM:
            self._judge(source)

    def end(self) -> None:
        """All units are in: judge the small sources as well."""
        for source in self._names:
            self._judge(source)

    def _counted(self, unit: dict[str, Any]) -> Mapping[str, int]:
        """Documents of the unit that count, by reason."""
        raise NotImplementedError

    def _judge(self, source: str) -> None:
        raise NotImplementedError
