"""How far the stage at work is, for whoever watches a driver: the line of the run's `progress.json` whenever it has changed.

The stage writes that file from its own processes (`pipeline.workflow.record.ProgressFile`). The driver reads it from storage, in a
thread of its own, because a driver must neither end nor stand still with a storage that is slow or away. Such trouble is said once
until it is over. While nothing changes a heartbeat says so.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from types import TracebackType

from pipeline.storage import Storage
from pipeline.workflow.heartbeat import Heartbeat
from pipeline.workflow.record import StageProgress, read_progress

EVERY_S = 5.0


@dataclass(frozen=True)
class Work:
    """What is at work. What was written before `since` (UNIX time) is an earlier attempt's."""

    stage: str
    since: float


class ProgressLines:
    """Prints while its `with` block runs, about `work`, which the driver sets and unsets as the stage begins and ends.

    `show=False` where the stage itself prints to the same place: then only the heartbeat.
    """

    def __init__(self, storage: Storage, run_id: str, *, show: bool = True) -> None:
        self._storage, self._run_id, self._show = storage, run_id, show
        self._lock = threading.Lock()  # held while a line is printed: none comes after `work` has changed
        self._ended = threading.Event()
        self._heartbeat = Heartbeat()
        self._work: Work | None = None
        self._shown = ""
        self._away = False

    def __enter__(self) -> ProgressLines:
        threading.Thread(target=self._run, name="progress", daemon=True).start()
        self._heartbeat.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.work = None
        self._ended.set()  # not joined: it may hang in a read
        self._heartbeat.__exit__(kind, error, trace)

    @property
    def work(self) -> Work | None:
        return self._work

    @work.setter
    def work(self, work: Work | None) -> None:
        with self._lock:
            if work != self._work:
                self._work, self._shown = work, ""
                self._heartbeat.begin("" if work is None else f"{work.stage:<9} starting")

    def _run(self) -> None:
        while not self._ended.wait(EVERY_S):
            work = self._work
            if work is not None:
                self._look(work)

    def _look(self, work: Work) -> None:
        progress: StageProgress | None = None
        trouble = ""
        try:
            progress = read_progress(self._storage, self._run_id)
        except Exception as error:  # of a storage client, or a record that another version of the code wrote
            trouble = " ".join(f"{type(error).__name__}: {error}".split())
        with self._lock:
            if self._work != work:
                return
            if trouble and not self._away:
                print(f"progress cannot be read ({trouble}); {work.stage} goes on", file=sys.stderr, flush=True)
            self._away = bool(trouble)
            if progress and progress.stage == work.stage and progress.unit and progress.updated >= work.since:
                line = progress.line()
                if line != self._shown:
                    if self._show:
                        print(line, flush=True)
                    self._shown = line
                    self._heartbeat.begin(f"{work.stage:<9} at work, without news")
