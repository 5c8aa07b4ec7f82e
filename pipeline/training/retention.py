"""Which checkpoints of a run stay: the newest `checkpoint.keep`, every one whose step is a multiple of
`checkpoint.keep_every`, the one that `evaluation.checkpoint` names, those that have been evaluated as the chosen one, and
those that somebody reads just now. With `evaluation.follow` also the newest `evaluation.waiting` of the others that have no
result yet; one that is older goes without, and is named. What a follower has judged (evaluation/follow.py) need not stay.

Who reads a checkpoint while the run may go on pins it by an object whose name says everything,

    <root>/runs/<run_id>/train/pins/<step>-<UNIX time when it expires>-<random>

and renews it; a reader that was killed holds its checkpoint until then, not for ever. A follower's has `follower-` before the random
part, and the next follower takes its place: what nobody waits for any more need not stay because one was killed. Cost of `collect`: one listing of names
when it is called first, two short ones whenever something may have to go. A checkpoint goes manifest first, so a half-deleted one does not exist; `sweep` collects what is left of it,
and of saves that were cut off, when the run starts again.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.config.load import ConfigError
from pipeline.config.schema import CheckpointConfig, RunConfig
from pipeline.manifest import CheckpointManifest, DamagedRecord
from pipeline.optim.schedule import total_steps
from pipeline.storage import Storage
from pipeline.training.commits import (
    MANIFEST,
    WITHDRAWN,
    committed_steps,
    manifest_path,
    step_folder,
    step_folders,
    train_folder,
)

PIN_SECONDS = 3600.0
PIN = re.compile(r"(\d{8,})-(\d+)-(follower-)?[0-9a-f]+")
EVALUATION = re.compile(r"step-(\d{8,})\.json")
FOLLOWED = re.compile(r"step-(\d{8,})\.followed")


class Retention:
    """Deletes checkpoints of one run. Lives on rank 0."""

    def __init__(
        self, storage: Storage, run_id: str, config: CheckpointConfig, named: frozenset[int], waiting: int = 0
    ) -> None:
        """`named`: steps whose checkpoint stays whatever else happens. `waiting`: how many stay for a result beyond `keep`."""
        self._storage, self._run_id, self._config, self._named = storage, run_id, config, named
        self._waiting = waiting
        self._known: set[int] = set()  # to be committed
        self._steps: set[int] | None = None  # that have a folder and may have to go one day; None: not listed yet

    def collect(self, newest: int) -> list[int]:
        """Delete what need not stay now that step `newest` is committed; the steps. Later ones are none of its business."""
        if self._steps is None:
            self._steps = set(step_folders(self._storage, self._run_id))
        self._steps.add(newest)
        self._known.add(newest)
        steps = sorted(step for step in self._steps if step <= newest)
        kept = self._newest(steps)
        old = [step for step in steps if step not in kept]
        self._steps -= {step for step in old if step in self._named or self._is_kept_for_good(step)}
        doomed = [step for step in old if step in self._steps]
        waiting: list[int] = []
        if doomed:
            judged = evaluated_steps(self._storage, self._run_id)
            used = judged - followed_steps(self._storage, self._run_id) | pinned(self._storage, self._run_id)
            waiting = [step for step in doomed if step not in judged and step in self._known]
            used |= set(waiting[-self._waiting :] if self._waiting else ())
            doomed = [step for step in doomed if step not in used]
        for step in doomed:
            if self._waiting and step in waiting:
                print(
                    f"checkpoint of step {step} goes without a result: {len(waiting)} wait to be judged, and evaluation.waiting keeps "
                    f"{self._waiting}",
                    file=sys.stderr,
                    flush=True,
                )
            self._delete(step)
        return doomed

    def sweep(self, resumed: int) -> None:
        """When a run begins at step `resumed`: collect folders without a manifest, but not those of withdrawn checkpoints,
        and temporaries of killed processes."""
        steps = step_folders(self._storage, self._run_id)
        self._known, self._steps = set(committed_steps(self._storage, self._run_id)), None
        for step in sorted(set(steps) - self._known):
            withdrawn = f"{step_folder(self._run_id, step)}/{WITHDRAWN}"
            if step <= resumed or not self._storage.exists(withdrawn):
                self._storage.delete(step_folder(self._run_id, step))
        self._storage.sweep(train_folder(self._run_id))

    def withdraw(self, after: int, which: Callable[[CheckpointManifest], bool] | None = None) -> list[int]:
        """The run goes on from step `after`, since every later checkpoint is damaged, or (`which`) was taken on a way that it has left:
        they no longer count, but their bytes stay for whoever wants to know, until the run has come that far again. The steps."""
        found = []
        for step in step_folders(self._storage, self._run_id):
            path = manifest_path(self._run_id, step)
            if step > after and (data := self._storage.read_or_none(path)) is not None:
                if which is not None and not _is(which, data, path):
                    continue
                self._storage.write(f"{step_folder(self._run_id, step)}/{WITHDRAWN}", data)
                self._storage.delete(path)
                found.append(step)
        self._known -= set(found)
        return found

    def _newest(self, steps: list[int]) -> set[int]:
        """The newest `checkpoint.keep` that are committed."""
        found: set[int] = set()
        for step in reversed(steps):
            if len(found) == self._config.keep:
                break
            if step in self._known or self._storage.exists(manifest_path(self._run_id, step)):
                found.add(step)
        self._known |= found
        return found

    def _is_kept_for_good(self, step: int) -> bool:
        every = self._config.keep_every
        return every is not None and step % every == 0

    def _delete(self, step: int) -> None:
        folder = step_folder(self._run_id, step)
        self._storage.delete(f"{folder}/{MANIFEST}")
        self._storage.delete(folder)
        self._known.discard(step)
        if self._steps is not None:
            self._steps.discard(step)


def _is(which: Callable[[CheckpointManifest], bool], data: bytes, path: str) -> bool:
    try:
        return which(CheckpointManifest.parse(data, path))
    except DamagedRecord:  # it is passed over and named when the run looks for its newest
        return False


def named_steps(config: RunConfig) -> frozenset[int]:
    """Steps that the configuration names: a checkpoint is taken there, and kept."""
    return frozenset(named_by(config))


def averaged_steps(config: RunConfig) -> tuple[int, ...]:
    """The steps whose mean `publishing.average_last` asks for, ascending: the last scheduled ones up to the chosen checkpoint,
    whatever else was saved when the run was interrupted. Raises ConfigError if the run takes fewer."""
    count = config.publishing.average_last
    if count is None:
        return ()
    every, wanted = config.checkpoint.every_steps, config.evaluation.checkpoint
    last = total_steps(config.schedule, config.training.sequence_length) if wanted == "last" else wanted
    before = range(every * ((last - 1) // every), 0, -every)
    if len(before) + 1 < count:
        raise ConfigError(
            f"publishing.average_last {count}: up to step {last} the run takes {len(before) + 1} checkpoints; lower it, or "
            f"checkpoint.every_steps {every}"
        )
    return tuple(sorted([last, *before[: count - 1]]))


def check_named(config: RunConfig, storage: Storage) -> None:
    """Refuse, before anything is trained, a step that the run does not reach or has passed without a checkpoint."""
    steps, chosen = total_steps(config.schedule, config.training.sequence_length), config.evaluation.checkpoint
    if chosen != "last" and not 1 <= chosen <= steps:
        raise ConfigError(
            f"evaluation.checkpoint {chosen}: the run has {steps:,} steps; name one of 1 to {steps}, or last"
        )
    for wanted, named in named_by(config).items():
        if storage.exists(manifest_path(config.run_id, wanted)):
            continue
        there = committed_steps(storage, config.run_id)
        if there and there[-1] >= wanted:
            raise ConfigError(
                f"{named.setting}: the run has got to step {there[-1]} and has no checkpoint of step {wanted}; "
                f"there are {there}: {named.remedy}"
            )


@dataclass(frozen=True)
class Named:
    """Why a checkpoint is wanted: the setting with its value, and what to do where it cannot be had."""

    setting: str
    remedy: str


def named_by(config: RunConfig) -> dict[int, Named]:
    """The steps that the configuration names, and by what; a step that is named twice by the setting that asks for it alone."""
    wanted = config.evaluation.checkpoint
    mean = Named(f"publishing.average_last {config.publishing.average_last}", "lower it, or leave it out")
    one = Named(f"evaluation.checkpoint {wanted}", "name another step, or last")
    return dict.fromkeys(averaged_steps(config), mean) | ({} if wanted == "last" else {wanted: one})


def evaluated_steps(storage: Storage, run_id: str) -> set[int]:
    """Steps that have a result of evaluation."""
    return _steps_named(storage, run_id, EVALUATION)


def followed_steps(storage: Storage, run_id: str) -> set[int]:
    """Steps that were, or are just being, judged by a follower."""
    return _steps_named(storage, run_id, FOLLOWED)


def mark_followed(storage: Storage, run_id: str, step: int) -> None:
    """Before its result is written: the result will hold nothing."""
    if step not in evaluated_steps(storage, run_id):
        storage.write(f"runs/{run_id}/evaluate/step-{step:08d}.followed", b"")


def _steps_named(storage: Storage, run_id: str, kind: re.Pattern[str]) -> set[int]:
    found = (kind.fullmatch(name) for name in storage.names(f"runs/{run_id}/evaluate"))
    return {int(match.group(1)) for match in found if match}


def pinned(storage: Storage, run_id: str) -> set[int]:
    """Steps that somebody reads. Pins that have expired are deleted."""
    found, now = set(), time.time()
    for name in storage.names(pins_folder(run_id)):
        match = PIN.fullmatch(name)
        if match and int(match.group(2)) > now:
            found.add(int(match.group(1)))
        elif match:
            storage.delete(f"{pins_folder(run_id)}/{name}")
    return found


def follower_pins(storage: Storage, run_id: str) -> list[str]:
    """The paths of pins that followers hold, or held when they were killed."""
    found = ((name, PIN.fullmatch(name)) for name in storage.names(pins_folder(run_id)))
    return [f"{pins_folder(run_id)}/{name}" for name, match in found if match and match.group(3)]


@contextlib.contextmanager
def reading(
    storage: Storage, run_id: str, step: int, seconds: float = PIN_SECONDS, *, follower: bool = False
) -> Iterator[None]:
    """Keep the checkpoint of a step while the block runs; `seconds` after a reader's death its pin means nothing."""
    ended = threading.Event()
    held = [_pin(storage, run_id, step, seconds, follower)]

    def renew() -> None:
        while not ended.wait(seconds / 3):
            held.append(_pin(storage, run_id, step, seconds, follower))
            storage.delete(held.pop(0))

    thread = threading.Thread(target=renew, name="checkpoint-pin", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for path in held:
            storage.delete(path)


def _pin(storage: Storage, run_id: str, step: int, seconds: float, follower: bool) -> str:
    who = ("follower-" if follower else "") + uuid.uuid4().hex[:12]
    path = f"{pins_folder(run_id)}/{step:08d}-{int(time.time() + seconds)}-{who}"
    storage.write(path, b"")
    return path


def pins_folder(run_id: str) -> str:
    """Of the pins on a run's checkpoints."""
    return f"{train_folder(run_id)}/pins"
