"""Where a run stands, in a word: read off its events, the progress of the stage at work and its journal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.training.journal import History
from pipeline.workflow.duration import duration
from pipeline.workflow.record import StageProgress

STALE_S = 120.0  # without news of a stage that is at work
LAST = "publish"  # the stage after which a run is done


@dataclass(frozen=True)
class StageAttempt:
    """A start of a stage. `ended` is None while it is at work; one that was killed ended when it was last heard of."""

    stage: str
    began: float  # UNIX
    ended: float | None
    outcome: str  # "", finished, failed, stopped, killed
    error: str = ""

    def seconds(self, now: float) -> float:
        return max((now if self.ended is None else self.ended) - self.began, 0.0)


@dataclass(frozen=True)
class State:
    """`word` is one of waiting, running, silent, killed, failed, stopped, done, between, new."""

    word: str
    stage: str = ""
    detail: str = ""

    @property
    def at_work(self) -> bool:
        return self.word in ("waiting", "running")

    def __str__(self) -> str:
        return f"{self.word}: {self.stage}" if self.stage and self.word != "done" else self.word


def attempts_of(events: Sequence[dict[str, Any]], history: History, now: float) -> list[StageAttempt]:
    """In the order of their beginnings. What was killed says so nowhere: it is known when its stage begins again."""
    found: list[StageAttempt] = []
    running: dict[str, int] = {}  # stage -> place in `found`
    for event in events:
        stage, kind = event["stage"], event["event"]
        if kind == "started":
            if stage in running:
                found[running[stage]] = _killed(found[running[stage]], history, event["time"])
            running[stage] = len(found)
            found.append(StageAttempt(stage, event["time"], None, ""))
        elif kind in ("finished", "failed") and stage in running:
            begun = found[running.pop(stage)]
            error = str(event.get("error", ""))
            outcome = "stopped" if error.startswith("Interrupted") else kind
            found[found.index(begun)] = StageAttempt(stage, begun.began, event["time"], outcome, error)
    return found


def _killed(attempt: StageAttempt, history: History, before: float) -> StageAttempt:
    heard = [each.last_time for each in history.attempts if attempt.began <= each.last_time <= before]
    last = max(heard, default=attempt.began) if attempt.stage == "train" else attempt.began
    return StageAttempt(attempt.stage, attempt.began, last, "killed")


def state_of(
    attempts: Sequence[StageAttempt],
    events: Sequence[dict[str, Any]],
    progress: StageProgress | None,
    history: History,
    now: float,
) -> State:
    """`waiting` is for hardware, `silent` a stage that began and has not been heard of for two minutes, `between` one stage is
    done and the next has not begun."""
    waits = progress is not None and not progress.unit and now - progress.updated < STALE_S
    if progress is not None and waits and (not attempts or attempts[-1].began < progress.updated):
        return State("waiting", progress.stage, progress.note)
    asked = [event for event in events if event["event"] == "asked"]
    if asked and now - asked[-1]["time"] < STALE_S and not any(each.began > asked[-1]["time"] for each in attempts):
        return State("waiting", asked[-1]["stage"], "asked for, and starting")
    if not attempts:
        return State("new")
    last = attempts[-1]
    if last.outcome in ("failed", "stopped"):
        return State(last.outcome, last.stage, last.error)
    if last.outcome == "finished":
        if last.stage == LAST:
            return State("done", last.stage)
        return State("between", last.stage, f"{last.stage} is done; the next stage has not begun")
    heard = [event["time"] for event in events]
    heard += [progress.updated] if progress is not None else []
    heard += [history.steps[-1]["time"]] if history.steps and "time" in history.steps[-1] else []
    age = now - max(heard)
    if age > STALE_S:
        return State("silent", last.stage, f"no news for {duration(age)}: killed, or its storage is away")
    return State("running", last.stage, progress.line() if progress and progress.stage == last.stage else "")
