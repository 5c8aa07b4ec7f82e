"""Goodput: the share of a run's wall time in which it made progress that lasts, and what became of the rest.

The wall time of training runs from when it was first asked for (its first event) to its end, or to the last sign of life of one that
is not over. Every second of it is in exactly one of

    useful        steps that nobody did again, without what is named below
    queueing      a RayJob waits for its quota
    starting      from the start of the stage to the first step; of an attempt's first step what is beyond the usual
    repeated      steps that a later attempt did again
    restarting    after a loss: steps that were not logged any more, noticing it, and a new group up to its first step
    saving        saves, as far as the loop waited for them, and the last one of all
    data          waiting for rows
    stalled       of a step what is beyond STALL times the usual for its size
    away          nobody was at work: from a failure, or from the death of everything, until somebody started it again

An attempt is a begin in the run's journal (journal.py); its steps follow each other without a gap, and their times are in the
lines. What lies between attempts is cut by the run's events (workflow/record.py). Steps that lasted but whose lines were lost are
taken to have been as long as the attempt's others.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from pipeline.storage import Storage
from pipeline.training.journal import Line, read_journal
from pipeline.workflow.duration import duration
from pipeline.workflow.record import read_events

STAGE = "train"
STALL = 2.0  # times the usual
# what the time after an event is
AFTER = {"started": "starting", "failed": "away", "queued": "queueing", "starting": "starting", "running": "starting"}
AFTER |= {"retrying": "restarting"}


@dataclass
class Goodput:
    """Seconds; they add up to `wall`."""

    useful: float = 0.0
    queueing: float = 0.0
    starting: float = 0.0
    repeated: float = 0.0
    restarting: float = 0.0
    saving: float = 0.0
    data: float = 0.0
    stalled: float = 0.0
    away: float = 0.0
    steps_repeated: int = field(default=0, metadata={"seconds": False})
    restarts: int = field(default=0, metadata={"seconds": False})  # attempts but the first

    @property
    def seconds(self) -> dict[str, float]:
        """By what became of them, `useful` first."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.metadata.get("seconds", True)}

    @property
    def wall(self) -> float:
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """Useful time over wall time."""
        return self.useful / self.wall if self.wall else 0.0

    def line(self) -> str:
        """For people: the share, and what was lost, most first."""
        lost = sorted(((seconds, name) for name, seconds in self.seconds.items() if name != "useful"), reverse=True)
        told = [f"{name} {seconds / self.wall:.1%}" for seconds, name in lost if seconds >= 0.001 * self.wall]
        return f"{self.share:.1%} of {duration(self.wall)}" + (f"; {', '.join(told)}" if told else "")


def read_goodput(storage: Storage, run_id: str) -> Goodput | None:
    """None before training has begun a step."""
    return goodput(read_events(storage, run_id), read_journal(storage, run_id).lines)


def goodput(events: Sequence[Mapping[str, Any]], lines: Sequence[Line]) -> Goodput | None:
    """From the events of a run and the lines of its journal, both in order."""
    attempts = _attempts(lines)
    if not attempts:
        return None
    ours = [event for event in events if event["stage"] == STAGE]
    marks = [(float(event["time"]), state) for event in ours if (state := _after(event))]
    usual = _usual(attempts)
    found = Goodput(restarts=len(attempts) - 1)
    at = min([attempts[0].begun, *(time for time, _ in marks[:1])])
    for number, attempt in enumerate(attempts):
        lasting = min((later.from_step for later in attempts[number + 1 :]), default=attempt.last_step)
        _between(found, at, attempt.begun, marks, "restarting" if number else "starting")
        at = attempt.begun + attempt.count(found, lasting, usual)
        if number + 1 < len(attempts):
            at += attempt.count_unlogged(found, lasting, usual, attempts[number + 1].begun - at)
    ends = [event for event in ours if event["event"] in ("finished", "failed") and event["time"] > at]
    for event in ends[-1:]:
        if event["event"] == "finished":
            found.saving += event["time"] - at
        else:
            found.restarting += event["time"] - at
    return found


@dataclass
class _Attempt:
    begun: float  # UNIX time
    from_step: int
    lines: list[Line] = field(default_factory=list)  # that tell times

    @property
    def last_step(self) -> int:
        """That it is known to have done."""
        return max((line["step"] for line in self.lines), default=self.from_step)

    def count(self, found: Goodput, lasting: int, usual: float) -> float:
        """Add the steps that are in the lines, those after `lasting` as repeated; their seconds. `usual`: of a sequence."""
        in_all = 0.0
        for index, line in enumerate(self.lines):
            steps = line["last_step"] - line["first_step"] + 1
            seconds = steps * line["seconds"]
            in_all += seconds
            kept = min(max(lasting - line["first_step"] + 1, 0), steps) / steps
            save, data = (kept * steps * line[f"seconds_{phase}"] for phase in ("save", "data"))
            work = kept * seconds - save - data
            expected = kept * steps * line["global_batch"] * usual
            beyond = max(0.0, work - (expected if index == 0 else STALL * expected))
            found.repeated += (1 - kept) * seconds
            found.saving += save
            found.data += data
            if index == 0:
                found.starting += beyond
            else:
                found.stalled += beyond
            found.useful += work - beyond
        found.steps_repeated += max(0, self.last_step - lasting)
        return in_all

    def count_unlogged(self, found: Goodput, lasting: int, usual: float, room: float) -> float:
        """Add the steps up to `lasting` whose lines were lost, which took at most `room` seconds; their seconds."""
        missing = lasting - max((line["last_step"] for line in self.lines), default=self.from_step)
        if missing <= 0 or not self.lines or usual == math.inf:
            return 0.0
        seconds = min(missing * self.lines[-1]["global_batch"] * usual, max(room, 0.0))
        found.useful += seconds
        return seconds


def _attempts(lines: Sequence[Line]) -> list[_Attempt]:
    found: list[_Attempt] = []
    for line in lines:
        if "from_step" in line:
            found.append(_Attempt(line["time"], line["from_step"]))
        elif found and line.get("first_step") and line.get("global_batch"):
            found[-1].lines.append(line)
    return found


def _usual(attempts: Sequence[_Attempt]) -> float:
    """Median seconds of a sequence, without saving and waiting for data; an attempt's first steps are not usual."""
    known = [
        (line["seconds"] - line["seconds_save"] - line["seconds_data"]) / line["global_batch"]
        for attempt in attempts
        for line in attempt.lines[1:]
    ]
    return statistics.median(known) if known else math.inf


def _after(event: Mapping[str, Any]) -> str:
    """What the time after an event is; nothing for one that changes nothing."""
    if event["event"] == "rayjob":
        return AFTER.get(event.get("phase", ""), "away")
    return AFTER.get(event["event"], "")


def _between(found: Goodput, begin: float, end: float, marks: Sequence[tuple[float, str]], state: str) -> None:
    """Cut the time before an attempt by the events in it. Who starts a run whose end nobody told, found it dead."""
    inside = [(time, after) for time, after in marks if begin <= time < end]
    if state == "restarting" and any(after != "restarting" for _, after in inside):
        state = "away"
    for time, after in [*inside, (end, "")]:
        setattr(found, state, getattr(found, state) + max(0.0, time - begin))
        begin, state = max(begin, time), after
