"""The logged steps of a run, each once, as a tracker should show them: its journal, and its metrics where the journal's lines were lost."""

from __future__ import annotations

import json
from typing import Any

from pipeline.storage import Storage
from pipeline.training.commits import train_folder
from pipeline.training.journal import JournalReader

Record = dict[str, Any]


class Records:
    """Of one run; cheap to ask again."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        self._storage, self._folder = storage, f"{train_folder(run_id)}/metrics"
        self._journal = JournalReader(storage, run_id)
        self._attempts = -1  # not asked yet
        self._stored: dict[int, Record] = {}
        self.gone_back: int | None = (
            None  # how often the run had gone back on a spike where the records end, if they tell
        )

    def read(self) -> list[Record]:
        """By step, ascending. `time` is there where the journal has it."""
        history = self._journal.read()
        self.gone_back = history.attempts[-1].gone_back if history.attempts else None
        if len(history.attempts) != self._attempts:  # one that began may have lost lines of the one before
            self._attempts = len(history.attempts)
            self._stored = {record["step"]: record for record in self._metrics()}
        begun = history.attempts[-1].from_step if history.attempts else max(self._stored, default=0)
        found = {step: record for step, record in self._stored.items() if step <= begun}
        found |= {line["step"]: line for line in history.steps}
        return [found[step] for step in sorted(found)]

    def _metrics(self) -> list[Record]:
        names = sorted(name for name in self._storage.names(self._folder) if name.endswith(".jsonl"))
        data = (self._storage.read_or_none(f"{self._folder}/{name}") or b"" for name in names)
        return [json.loads(line) for text in data for line in text.splitlines()]
