"""One writer at a time: a lease is a small record in storage that its holder keeps changing.

    {"number": 3, "holder": "5f0c...", "owner": "...", "who": "ann on node-7 (process 4711)", "since": "2026-...", "beat": 41, ...}

Who comes takes the record by compare-and-swap if it was released, if its holder's process is gone from this very machine, or if
it has not changed for three of its beats; a record that goes on changing belongs to somebody who lives (Held). No clocks are
compared, of which two never agree and one may be set back: only the newcomer's own stopwatch counts.

`number` grows with every holder and fences: what a holder commits carries it, what it has not committed lies where no other
holder writes, and it looks at the record once more before it commits. A holder that was suspended and wakes finds another number
and commits nothing (LeaseLost).
"""

from __future__ import annotations

import contextlib
import getpass
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from pipeline.manifest import Record
from pipeline.storage import Storage

BEAT_S = 5.0
BEATS_UNTIL_DEAD = 3
TAKEOVERS = 20  # lost races in a row for a free lease


class LeaseRecord(Record):
    """The object itself."""

    number: int  # of this holder; the first one's is 1
    holder: str  # a word nobody else has
    owner: str  # a holder may take over from one of the same owner at once: a restarted group from its dead self
    who: str  # for people
    since: str  # ISO 8601, UTC, by the holder's clock; for people
    beat: int  # grows while the holder lives
    beat_s: float  # how often
    process: str  # machine, process namespace, pid and start time: tells others on this machine that it is gone
    released: bool = False


class Held(RuntimeError):
    """Somebody else holds the lease and lives."""

    def __init__(self, record: LeaseRecord, what: str) -> None:
        super().__init__(record, what)  # as given, so that it can be pickled
        self.record = record
        self.what = what

    def __str__(self) -> str:
        record, wait = self.record, self.record.beat_s * BEATS_UNTIL_DEAD
        return (
            f"{self.what} is being written by {record.who}, since {record.since} (holder {record.number}); wait for it, stop it, or take "
            f"over with `moonlight release`; {wait:.0f} s after its last sign of life the same command takes over"
        )


class LeaseLost(RuntimeError):
    """This process was taken for dead, or was told to give way, and must write no more."""


class Lease:
    """A held lease. `number` fences what is written under it."""

    def __init__(self, storage: Storage, path: str, record: LeaseRecord, what: str) -> None:
        self._storage = storage
        self._path = path
        self._what = what
        self._record = record
        self._stop = threading.Event()
        self._lost: LeaseRecord | None = None
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    @property
    def number(self) -> int:
        return self._record.number

    @property
    def lost(self) -> bool:
        """As far as the heartbeat knows; costs nothing."""
        return self._lost is not None

    def check(self) -> None:
        """Ask storage whether the lease is still ours, before something is committed. Raises LeaseLost."""
        found = _read(self._storage, self._path)
        if found is not None and found.holder != self._record.holder:
            self._lost = found
        if self._lost is not None:
            raise LeaseLost(
                f"{self._what} has been taken over by {self._lost.who} (holder {self._lost.number}, this was {self.number}): "
                "this process was not heard of for too long, or was told to give way; nothing more is written"
            )

    def release(self) -> None:
        """Stop the heartbeat and let the next one in at once."""
        self._stop.set()
        self._thread.join()
        if self._lost is None:
            with contextlib.suppress(OSError):  # storage is away: the next one waits
                self._change(released=True)

    def _beat(self) -> None:
        while not self._stop.wait(self._record.beat_s):
            try:
                if not self._change(beat=self._record.beat + 1):
                    return
            except Exception as error:  # storage is away: whoever else cannot reach it cannot take over either
                print(
                    f"lease of {self._what} not renewed ({type(error).__name__}: {error})", file=sys.stderr, flush=True
                )

    def _change(self, **fields: object) -> bool:
        """Write the record anew if it is ours. A swap that did not work may have, with its answer lost: look again."""
        changed = self._record.model_copy(update=fields)
        etag = self._storage.etag(
            self._path
        )  # before the look: a later holder's record never goes with an earlier etag
        found = _read(self._storage, self._path)
        if found is None or found.holder != self._record.holder:
            self._lost = found or self._record.model_copy(update={"who": "nobody (the record was deleted)"})
            return False
        if self._storage.swap(self._path, changed.to_json(), etag):
            self._record = changed
        return True


@contextlib.contextmanager
def hold(
    storage: Storage,
    path: str,
    *,
    what: str,
    owner: str | None = None,
    after: int = 0,
    beat_s: float = BEAT_S,
    waiting: Callable[[LeaseRecord, float], None] | None = None,
) -> Iterator[Lease]:
    """Hold the lease at `path` for the length of the block.

    Args:
        what: named in messages, e.g. "run debug".
        owner: whose restarts take over from each other at once; None: nobody's.
        after: the largest number known of what was written under this lease, in case somebody deleted the record.
        waiting: told once, with the seconds, if a silent holder has to be waited for.

    Raises Held if somebody else holds it and lives.
    """
    record = acquire(storage, path, what=what, owner=owner, after=after, beat_s=beat_s, waiting=waiting)
    lease = Lease(storage, path, record, what)
    try:
        yield lease
    finally:
        lease.release()


def acquire(
    storage: Storage,
    path: str,
    *,
    what: str,
    owner: str | None = None,
    after: int = 0,
    beat_s: float = BEAT_S,
    waiting: Callable[[LeaseRecord, float], None] | None = None,
) -> LeaseRecord:
    """Take the lease, without a heartbeat. Arguments and errors as of `hold`."""
    owner = owner or uuid.uuid4().hex
    for _ in range(TAKEOVERS):
        etag = storage.etag(path)
        found = _read(storage, path)
        if found is not None and not _is_free(found, owner):
            _wait_for_silence(storage, path, found, what, waiting)
            if (
                _read(storage, path) != found
            ):  # it beat once more, was released, or another newcomer was faster: look again
                continue
        mine = _record(max(after, 0 if found is None else found.number), owner, beat_s)
        if storage.swap(path, mine.to_json(), etag) or _read(storage, path) == mine:  # the answer may be lost
            return mine
    raise Held(_read(storage, path) or mine, what)


def say_waiting(holder: LeaseRecord, seconds: float) -> None:
    """For `waiting`: a line for people."""
    print(f"waiting up to {seconds:.0f} s for a sign of life of {holder.who}", file=sys.stderr, flush=True)


def refuse_held(storage: Storage, path: str, what: str) -> None:
    """Raises Held if somebody who lives holds the lease: before any hardware is asked for. Waits for at most three beats."""
    holder = living(storage, path)
    if holder is not None:
        raise Held(holder, what)


def living(storage: Storage, path: str) -> LeaseRecord | None:
    """The holder, if it gives a sign of life while we look or might be alive; None if the lease is free. At most three of its beats."""
    found = _read(storage, path)
    if found is None or _is_free(found, ""):
        return None
    try:
        _wait_for_silence(storage, path, found, "", None)
    except Held as held:
        return held.record
    return None


def give_way(storage: Storage, path: str) -> LeaseRecord | None:
    """Tell the holder, alive or not, to write no more; returns its record, None if the lease was free."""
    for _ in range(TAKEOVERS):
        etag = storage.etag(path)
        found = _read(storage, path)
        if found is None or found.released:
            return None
        mine = _record(found.number, uuid.uuid4().hex, BEAT_S).model_copy(update={"released": True})
        if storage.swap(path, mine.to_json(), etag):
            return found
    raise OSError(f"{storage.uri(path)} changed {TAKEOVERS} times while it was looked at")


def _is_free(found: LeaseRecord, owner: str) -> bool:
    return found.released or found.owner == owner or _is_gone(found.process)


def _wait_for_silence(
    storage: Storage, path: str, found: LeaseRecord, what: str, waiting: Callable[[LeaseRecord, float], None] | None
) -> None:
    """Returns when the record has changed hands or its holder was silent for too long. Raises Held at its second beat: a group
    that is being killed may give one more."""
    silence = found.beat_s * BEATS_UNTIL_DEAD
    if waiting is not None:
        waiting(found, silence)
    beats, last = 0, found
    deadline = time.monotonic() + silence
    while time.monotonic() < deadline:
        time.sleep(found.beat_s / 4)
        now = _read(storage, path)
        if now is None or now.holder != found.holder or now.released or _is_gone(now.process):
            return
        if now.beat != last.beat:
            beats, last = beats + 1, now
            deadline = time.monotonic() + silence
        if beats == 2:
            raise Held(now, what)


def _read(storage: Storage, path: str) -> LeaseRecord | None:
    """None without a record. Raises ValueError for one that is damaged."""
    data = storage.read_or_none(path)
    if data is None:
        return None
    try:
        return LeaseRecord.model_validate_json(data)
    except ValidationError:
        raise ValueError(
            f"{storage.uri(path)} is damaged: make sure that nothing writes there, then delete it"
        ) from None


def _record(before: int, owner: str, beat_s: float) -> LeaseRecord:
    return LeaseRecord(
        number=before + 1,
        holder=uuid.uuid4().hex,
        owner=owner,
        who=f"{person()} (process {os.getpid()})",
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        beat=0,
        beat_s=beat_s,
        process=_process(os.getpid()) or "",
    )


def person() -> str:
    """Who runs this process, for people: `ann on node-7`."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        name = f"user {os.getuid()}"
    return f"{name} on {os.uname().nodename}"


def _process(pid: int) -> str | None:
    """Names a process of this boot of this machine's kernel as nothing else; None where that cannot be told or it is gone."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if start[0] in "ZX" else f"{boot} {namespace} {pid} {start[19]}"


def _is_gone(process: str) -> bool:
    """Was this a process that this machine would see and does not?"""
    own = _process(os.getpid())
    parts = process.split()
    if own is None or len(parts) != 4 or parts[:2] != own.split()[:2]:
        return False
    return _process(int(parts[2])) != process
