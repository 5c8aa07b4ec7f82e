"""The run's page while a stage works: written anew by a thread of the stage's driver, and once more when the stage ends, however it ends.

A page is for people: a storage that is away is said once, and the stage goes on without.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from jobs.on_ray.gauges import WATCHERS
from pipeline.background import Background
from pipeline.report.page import write_page
from pipeline.report.run import Run, RunReader
from pipeline.storage import Storage

LOOK_S = 5.0
WRITE_S, SELDOM_S = 15.0, 120.0  # between two pages: of a young run, and of one of days
PATIENCE_S = 20.0  # for the last page


class LivePage(Background):
    """Looks at the run while its `with` block runs. `seen` is told of every look (gauges)."""

    def __init__(self, storage: Storage, run_id: str, seen: Callable[[Run], None] | None = None) -> None:
        super().__init__("page", patience_s=PATIENCE_S, first_s=LOOK_S)
        self._storage, self._run_id, self._seen = storage, run_id, seen
        self._reader = RunReader(storage, run_id)
        self._away = False
        self._began, self._written = time.monotonic(), float("-inf")

    def work(self) -> float:
        now = time.monotonic()
        self._look(write=now - self._written >= min(max(WRITE_S, (now - self._began) / 100), SELDOM_S))
        return LOOK_S

    def finish(self) -> None:
        self._look(write=True)

    def _look(self, *, write: bool) -> None:
        try:
            run = self._reader.read()
            if self._seen is not None:
                self._seen(run)
            if write:
                write_page(self._storage, self._run_id, run)
                self._written = time.monotonic()
            self._away = False
        except Exception as error:  # of a storage client, or of a record that another version of the code wrote
            if not self._away:
                said = " ".join(f"{type(error).__name__}: {error}".split())
                print(f"the run's page cannot be written ({said}); the stage goes on", file=sys.stderr, flush=True)
            self._away = True


def watched(stage: str, storage: Storage, run_id: str) -> LivePage:
    """For the driver of a stage that is about to begin, connected to Ray: its page and its gauges."""
    gauges = WATCHERS.get(stage)
    return LivePage(storage, run_id, None if gauges is None else gauges(storage, run_id))


def write_last_page(storage: Storage, run_id: str) -> None:
    """After a stage that may have died without a word. Never raises: the page is not why the driver is here."""
    page = LivePage(storage, run_id)
    with page:
        pass
