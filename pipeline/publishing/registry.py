"""Published versions, the pointer to the one in use, and how it moved.

    <root>/models/<name>/<version>/      the model; `manifest.json` is written last and makes it exist
    <root>/models/<name>/latest.json     the promoted version and the history of the pointer, replaced only by compare-and-swap

A version is promoted by itself at most once in its life: publishing it again (a re-run, a slow second publisher, a restart
after a crash) never takes the pointer back from a newer one, and a run's earlier step never replaces a later step of the
same run. People may move it anywhere: `moonlight models promote` and `rollback`. Pointer and history are one object, so of
any number of movers each finds the other's move or is found by it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Literal

from pipeline.integrity import damage, read_record
from pipeline.lease import person
from pipeline.manifest import ModelManifest, Record
from pipeline.storage import Storage

ATTEMPTS = 100  # lost races in a row before giving up; each means that another publisher got through
VERIFIED_AT_ONCE = 4  # files; sha256 runs at 1 GB/s a core


class Move(Record):
    """The pointer moved."""

    action: Literal["promote", "rollback"]
    version: str  # to which it points since
    before: str = ""  # to which it pointed; "": nowhere
    at: str = ""  # UTC
    who: str = ""
    because: str = ""  # what a person said


class Latest(Record):
    """`<root>/models/<name>/latest.json`"""

    version: str
    manifest_digest: str
    run_identity: str
    step: int
    loss: float
    bits_per_byte: float
    previous: tuple[str, ...] = ()  # other versions promoted so far, oldest first
    history: tuple[Move, ...] = ()  # oldest first; older publishers kept none

    @property
    def order(self) -> tuple[str, ...]:
        """Versions in the order of their first promotion."""
        moved = [move.version for move in self.history]
        known = [version for version in (*self.previous, self.version) if version not in moved]
        return tuple(dict.fromkeys([*known, *moved]))


def folder(name: str, version: str) -> str:
    return f"models/{name}/{version}"


def latest_path(name: str) -> str:
    return f"models/{name}/latest.json"


def find(storage: Storage, name: str, version: str) -> ModelManifest | None:
    """A published version's manifest, None if there is no such version."""
    return read_record(storage, f"{folder(name, version)}/manifest.json", ModelManifest)


def latest(storage: Storage, name: str) -> Latest | None:
    """The promoted version, None before the first."""
    return read_record(storage, latest_path(name), Latest)


def commit(storage: Storage, manifest: ModelManifest) -> ModelManifest:
    """Make the version exist. Of concurrent publishers one writes; the others must have made the same thing."""
    path = f"{folder(manifest.name, manifest.version)}/manifest.json"
    if storage.create(path, manifest.to_json()):
        return manifest
    other = ModelManifest.parse(storage.read(path), storage.uri(path))
    if other.digest != manifest.digest:
        raise ValueError(
            f"{storage.uri(path)}: version {manifest.version} is published with other content "
            f"({other.digest[:8]}, this one is {manifest.digest[:8]}): its inputs are the same but its bytes are not"
        )
    return other


def promote(storage: Storage, manifest: ModelManifest, allowed: Callable[[], None] = lambda: None) -> bool:
    """Point `latest.json` at the version; False if it stays where it is (see the module's rule).

    `allowed` is asked before each attempt, with the pointer as it is then, and raises if the version may not.
    """

    def successor(current: Latest | None) -> Latest | None:
        if is_settled(current, manifest):
            return None
        allowed()
        return _moved(current, manifest, "promote", "")

    return _swap(storage, manifest.name, successor) is not None


def move(
    storage: Storage,
    manifest: ModelManifest,
    action: Literal["promote", "rollback"],
    because: str,
    allowed: Callable[[], None] = lambda: None,
) -> bool:
    """Point `latest.json` at the version because a person says so; False if it points there already."""

    def successor(current: Latest | None) -> Latest | None:
        if current is not None and current.version == manifest.version:
            return None
        allowed()
        return _moved(current, manifest, action, because)

    return _swap(storage, manifest.name, successor) is not None


def is_settled(current: Latest | None, manifest: ModelManifest) -> bool:
    """Has the pointer been at the version, or must it not go there by itself?"""
    if current is None:
        return False
    if manifest.version in (current.version, *current.previous):
        return True
    return current.run_identity == manifest.run_identity and current.step >= manifest.step


def before_current(current: Latest) -> str | None:
    """The version that was promoted before the one in use; None if that was the first."""
    order = current.order
    place = order.index(current.version)
    return order[place - 1] if place else None


def _moved(
    current: Latest | None, manifest: ModelManifest, action: Literal["promote", "rollback"], because: str
) -> Latest:
    others = () if current is None else tuple(v for v in current.order if v != manifest.version)
    step = Move(
        action=action,
        version=manifest.version,
        before="" if current is None else current.version,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        who=person(),
        because=because,
    )
    return Latest(
        version=manifest.version,
        manifest_digest=manifest.digest,
        run_identity=manifest.run_identity,
        step=manifest.step,
        loss=manifest.loss,
        bits_per_byte=manifest.bits_per_byte,
        previous=others,
        history=(*(() if current is None else current.history), step),
    )


def _swap(storage: Storage, name: str, successor: Callable[[Latest | None], Latest | None]) -> Latest | None:
    """Replace the pointer by its successor, whatever others do meanwhile; None if it has none."""
    path = latest_path(name)
    mine: Latest | None = None
    for _ in range(ATTEMPTS):
        etag = storage.etag(path)  # before reading: a change in between makes the swap fail
        current = latest(storage, name) if etag is not None else None
        if mine is not None and current is not None and mine.history[-1] in current.history:
            return mine  # an earlier attempt got through and its answer was lost
        mine = successor(current)
        if mine is None or storage.swap(path, mine.to_json(), etag):
            return mine
    raise RuntimeError(f"{storage.uri(path)}: lost {ATTEMPTS} races in a row; look for a publisher that never stops")


def versions(storage: Storage, name: str) -> list[ModelManifest]:
    """All that are published under the name, by version. Raises DamagedRecord."""
    with ThreadPoolExecutor(16) as threads:  # on S3 each is a request
        names = sorted(each for each in storage.names(f"models/{name}") if not each.endswith(".json"))
        found = threads.map(lambda version: find(storage, name, version), names)
        return [manifest for manifest in found if manifest is not None]


def verify(storage: Storage, manifest: ModelManifest) -> list[str]:
    """Compare every published file with the manifest; one line for each that is missing or differs, none if all is well."""
    base = folder(manifest.name, manifest.version)
    with ThreadPoolExecutor(VERIFIED_AT_ONCE) as threads:
        return [
            problem for problem in threads.map(lambda entry: damage(storage, entry, base), manifest.files) if problem
        ]


def check(storage: Storage, manifest: ModelManifest) -> None:
    """Raises ValueError if a published file is not as it was written; the message names each."""
    problems = verify(storage, manifest)
    if problems:
        raise ValueError(
            f"model {manifest.name} {manifest.version} is damaged: {'; '.join(problems)}. Delete "
            f"{storage.uri(folder(manifest.name, manifest.version))} and publish again: the same bytes are written"
        )


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def pretty_json(value: object) -> bytes:
    """JSON for people: two spaces, keys in order, one final newline."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
