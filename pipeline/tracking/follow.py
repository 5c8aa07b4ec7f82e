"""Trackers follow a run: a thread for each reads the run's own records and sends on what the tracker does not have yet.

Training neither knows nor waits for them. The run's storage is the source, so a tracker whose server was away, that was killed with
the run, or that was only named later gets all that it lacks, each step once; what it has is asked of itself. That it does not
answer is said once, until it does. A trainer that was taken for dead sends nothing more: its successor does. A run that goes back on a
spike while it is followed is from then on another run there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from pipeline.background import Background
from pipeline.config.schema import RunConfig
from pipeline.storage import Storage
from pipeline.tracking.names import named
from pipeline.tracking.records import Records
from pipeline.tracking.tracker import RunName, Tracker, open_tracker, run_name

EVERY_S = 5.0
RETRY_S = 60.0  # after a tracker did not answer
PATIENCE_S = 30.0  # for the last records of a run


class Trackers:
    """All that `tracking.trackers` names, while the `with` block lasts. On rank 0."""

    def __init__(self, config: RunConfig, storage: Storage, check: Callable[[], None]) -> None:
        """`check`: asked before each sending; raises LeaseLost if somebody has taken the run over."""
        self._following = [_Following(Sender(name, config, storage, check)) for name in config.tracking.trackers]

    def __enter__(self) -> Trackers:
        for each in self._following:
            each.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self._following:
            each.end()
        deadline = time.monotonic() + PATIENCE_S
        for each in self._following:
            if not each.join(max(0.0, deadline - time.monotonic())):
                what = f"{each.name} has not got the last records; moonlight track sends them"
                print(what, file=sys.stderr, flush=True)


class Sender:
    """Of a run's records to one tracker."""

    def __init__(
        self, name: str, config: RunConfig, storage: Storage, check: Callable[[], None] = lambda: None
    ) -> None:
        self.name, self._config, self._storage, self._check = name, config, storage, check
        self._records = Records(storage, config.run_id)
        self._tracker: Tracker | None = None
        self._run: RunName | None = None  # for which it is open
        self._away = False
        self.sent = 0  # records

    def send(self) -> bool:
        """What the tracker lacks; False if it, or storage, does not answer, or if `check` raises."""
        try:
            self._check()
            records = self._records.read()
            run = run_name(self._config, self._storage, self._records.gone_back)
            if run != self._run:
                self.close()
            if records and self._tracker is None:
                self._tracker, self._run = open_tracker(self.name, self._config, self._storage, run), run
            if self._tracker is not None:
                self._add(self._tracker, records)
        except Exception as error:  # of a client of somebody else's: nothing that it raises may end training
            if not self._away:
                said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                print(
                    f"{self.name} does not get the run's records now ({said}); training goes on",
                    file=sys.stderr,
                    flush=True,
                )
            self._away = True
            self.close()
            return False
        self._away = False
        return True

    def close(self) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            try:
                tracker.close()
            except Exception as error:  # as above
                print(f"{self.name} was not closed ({type(error).__name__}: {error})", file=sys.stderr, flush=True)

    def _add(self, tracker: Tracker, records: list[dict[str, object]]) -> None:
        new = [record for record in records if int(str(record["step"])) > tracker.last_step]
        for record in new:
            step, at = int(str(record["step"])), record.get("time")
            tracker.add(step, float(str(at)) if at is not None else time.time(), named(record))
            tracker.last_step = step
        if new:
            tracker.flush()
            self.sent += len(new)


class _Following(Background):
    """One tracker."""

    def __init__(self, sender: Sender) -> None:
        super().__init__(sender.name, patience_s=PATIENCE_S)
        self._sender = sender

    def work(self) -> float:
        return EVERY_S if self._sender.send() else RETRY_S

    def finish(self) -> None:
        self._sender.send()
        self._sender.close()
