"""Published versions and the pointer to the one in use.

    <root>/models/<name>/<version>/      the model; `manifest.json` is written last and makes it exist
    <root>/models/<name>/latest.json     the promoted version, replaced only by compare-and-swap

`latest.json` remembers what it pointed at before. A version is promoted at most once in its life: publishing it again
(a re-run, a slow second publisher, a restart after a crash) never takes the pointer back from a newer one, and a run's
earlier step never replaces a later step of the same run. Deliberate rollback is an edit of `latest.json` by a person.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

from pipeline.integrity import damage, read_record
from pipeline.manifest import ModelManifest, Record
from pipeline.storage import Storage

ATTEMPTS = 100  # lost races in a row before giving up; each means that another publisher got through
VERIFIED_AT_ONCE = 4  # files; sha256 runs at 1 GB/s a core


class Latest(Record):
    """`<root>/models/<name>/latest.json`"""

    version: str
    manifest_digest: str
    run_identity: str
    step: int
    loss: float
    bits_per_byte: float
    previous: tuple[str, ...] = ()  # versions promoted before this one, oldest first


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


def promote(storage: Storage, manifest: ModelManifest) -> bool:
    """Point `latest.json` at the version; False if it stays where it is (see the module's rule)."""
    path = latest_path(manifest.name)
    for _ in range(ATTEMPTS):
        etag = storage.etag(path)  # before reading: a change in between makes the swap fail
        current = latest(storage, manifest.name) if etag is not None else None
        if current is not None:
            if manifest.version in (current.version, *current.previous):
                return False
            if current.run_identity == manifest.run_identity and current.step >= manifest.step:
                return False
        successor = Latest(
            version=manifest.version,
            manifest_digest=manifest.digest,
            run_identity=manifest.run_identity,
            step=manifest.step,
            loss=manifest.loss,
            bits_per_byte=manifest.bits_per_byte,
            previous=() if current is None else (*current.previous, current.version),
        )
        if storage.swap(path, successor.to_json(), etag):
            return True
    raise RuntimeError(f"{storage.uri(path)}: lost {ATTEMPTS} races in a row; look for a publisher that never stops")


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
