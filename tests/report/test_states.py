"""Where a run stands, from what it has recorded."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.report.states import STALE_S, attempts_of, state_of
from pipeline.training.journal import Attempt, History
from pipeline.workflow.record import StageProgress

NOW = 1000.0


def event(at: float, kind: str, stage: str, **facts: Any) -> dict[str, Any]:
    return {"time": at, "event": kind, "stage": stage, **facts}


def progress(stage: str, updated: float, unit: str = "steps") -> StageProgress:
    return StageProgress(stage, 3, 9, unit, 1.0, "tokens", 5.0, "queued" if not unit else "", updated)


STARTED = event(NOW - 500, "started", "train")
TROUBLE = event(NOW - 400, "failed", "train", seconds=100.0, error="TrainingFailed: no")
STOPPED = event(NOW - 400, "failed", "train", seconds=100.0, error="Interrupted: SIGTERM")
FINISHED = event(NOW - 400, "finished", "train", seconds=100.0)
PUBLISHED = [event(NOW - 300, "started", "publish"), event(NOW - 290, "finished", "publish", seconds=10.0)]


@pytest.mark.parametrize(
    ("events", "at", "word"),
    [
        ([], None, "new"),
        ([event(NOW - 5, "asked", "prepare")], None, "waiting"),
        ([event(NOW - 500, "asked", "prepare")], None, "new"),
        ([], progress("train", NOW - 5, unit=""), "waiting"),  # for its RayJob
        ([STARTED], progress("train", NOW - 5), "running"),
        ([STARTED], progress("train", NOW - STALE_S - 1), "silent"),
        ([STARTED], None, "silent"),
        ([STARTED, TROUBLE], progress("train", NOW - 405), "failed"),
        ([STARTED, TROUBLE, event(NOW - 5, "asked", "train")], progress("train", NOW - 405), "waiting"),
        ([STARTED, STOPPED], None, "stopped"),
        ([STARTED, FINISHED], None, "between"),
        ([STARTED, FINISHED, *PUBLISHED], progress("publish", NOW - 290), "done"),
        ([STARTED, FINISHED, *PUBLISHED, event(NOW - 10, "started", "train")], progress("train", NOW), "running"),
    ],
)
def test_state(events: list[dict[str, Any]], at: StageProgress | None, word: str) -> None:
    history = History()
    assert state_of(attempts_of(events, history, NOW), events, at, history, NOW).word == word


def test_a_step_is_news_even_without_progress() -> None:
    history = History([Attempt(1, 0, 2, NOW - 490, 7, NOW - 3)], [{"step": 7, "time": NOW - 3}])
    assert state_of(attempts_of([STARTED], history, NOW), [STARTED], None, history, NOW).word == "running"


def test_a_killed_attempt_ends_when_it_was_last_heard_of() -> None:
    """It says nothing itself: the stage begins again, and the journal has its last step."""
    events = [STARTED, event(NOW - 200, "started", "train"), event(NOW - 100, "finished", "train", seconds=100.0)]
    history = History([Attempt(1, 0, 2, NOW - 490, 50, NOW - 300), Attempt(2, 40, 2, NOW - 190, 90, NOW - 101)])
    found = attempts_of(events, history, NOW)
    assert [(each.outcome, each.seconds(NOW)) for each in found] == [("killed", 200.0), ("finished", 100.0)]
