"""Which steps of a run are to be profiled, on which ranks, and where that goes. No torch: commands ask, too.

    <root>/runs/<run_id>/train/profiles/request.json                            what a running run is asked for
    <root>/runs/<run_id>/train/profiles/step-00000100/rank-00000.trace.json.gz  what it wrote, named after its first step

A run that is at work looks for a request every LOOK_S seconds, on each rank in a thread of its own; so a request names steps that are not
reached yet, and all ranks take the same.
"""

from __future__ import annotations

import math

from pipeline.config.schema import ProfileConfig, RunConfig
from pipeline.integrity import read_record
from pipeline.manifest import Record
from pipeline.storage import Storage
from pipeline.training.commits import committed_steps, train_folder
from pipeline.training.journal import read_journal

LOOK_S = 5.0


class Request(Record):
    """`request.json`, replaced by the next one."""

    steps: tuple[int, int]
    ranks: tuple[int, ...]


def profiles_folder(run_id: str) -> str:
    return f"{train_folder(run_id)}/profiles"


def profile_folder(run_id: str, first_step: int) -> str:
    return f"{profiles_folder(run_id)}/step-{first_step:08d}"


def read_request(storage: Storage, run_id: str) -> Request | None:
    return read_record(storage, f"{profiles_folder(run_id)}/request.json", Request)


def ask(storage: Storage, config: RunConfig, count: int, ranks: tuple[int, ...], at: int | None) -> Request:
    """Ask the run for a profile of `count` steps from `at` on, by default as soon as all ranks have heard of it.

    Raises ValueError for a run that is not at work, steps that are past or beyond the end, and ranks that are not there.
    """
    history = read_journal(storage, config.run_id)
    if not history.attempts or storage.exists(f"{train_folder(config.run_id)}/manifest.json"):
        raise ValueError(f"run {config.run_id} is not in training; set training.profile before it starts")
    now = history.attempts[-1]
    if max(ranks, default=0) >= now.ranks:
        raise ValueError(f"--ranks {','.join(map(str, ranks))}: the run has ranks 0 to {now.ranks - 1}")
    if at is not None and at <= now.last_step:
        raise ValueError(
            f"--at {at}: that step is past, the run has done {now.last_step:,}; give a later one, or leave it out"
        )
    steps = history.steps[-1]["steps"] if history.steps else None
    seconds = next((line["seconds"] for line in reversed(history.steps) if line.get("seconds")), 1.0)
    first = at or now.last_step + history_lag(history.steps) + math.ceil(2 * LOOK_S / seconds) + 1
    wanted = ProfileConfig(steps=(first, first + count - 1), ranks=ranks)
    if steps is not None and wanted.steps[1] > steps:
        raise ValueError(
            f"steps {wanted.steps[0]} to {wanted.steps[1]}: the run ends after {steps:,}; ask for fewer or earlier ones"
        )
    request = Request(steps=wanted.steps, ranks=wanted.ranks)
    storage.write(f"{profiles_folder(config.run_id)}/request.json", request.to_json())
    return request


def history_lag(steps: list[dict[str, object]]) -> int:
    """Steps between two lines of the journal: so many may be done that nobody has heard of."""
    known = [int(str(line["step"])) for line in steps[-2:]]
    return known[-1] - known[0] if len(known) == 2 else 1


def check(config: RunConfig, storage: Storage) -> None:
    """Raises ValueError if `training.profile` is about steps that are past and were not profiled."""
    wanted = config.training.profile
    if wanted is None:
        return
    first, last = wanted.steps
    done = max(committed_steps(storage, config.run_id), default=0)
    if last <= done and not storage.names(profile_folder(config.run_id, first)):
        raise ValueError(
            f"training.profile.steps [{first}, {last}]: these steps are past, the run goes on after {done}; give later ones, or leave it out"
        )
