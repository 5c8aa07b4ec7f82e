"""A unit that kills its worker: suspected, tried alone, and if guilty quarantined by name.

Ray retries a task whose worker died without end, so a document that crashes or swells the process would hold up the dataset
for ever. Dead workers alone prove nothing, though: spot reclaims kill them all day. So each attempt leaves a marker while
it runs. A unit that finds two markers, two attempts that never ended, is processed in a child process with bounded memory;
if the child is killed twice while its parent lives, the unit is at fault: it is committed as one quarantined record.
Deleting its manifest (`datasets/units/ab/<unit>.json`) makes the next dataset version try again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any

import orjson

from data_prep.plan import Unit
from data_prep.records import UnitManifest, shard_path
from data_prep.rules.classifier import in_process
from data_prep.tokenize_unit import TokenizeSettings, tokenize_unit
from data_prep.writer import put
from pipeline.config.classifier import Classifier
from pipeline.config.load import ConfigError
from pipeline.integrity import read_record
from pipeline.manifest import DocumentCounts
from pipeline.storage import Storage, open_storage

UNFINISHED_ATTEMPTS = 2  # before a unit is tried alone
CHILD_DEATHS = 2  # before it is quarantined
CHILD_MEMORY_BYTES = 4 << 30
REASON = "unit_killed_worker"


def tokenize_guarded(settings: TokenizeSettings, unit: Unit) -> UnitManifest:
    """`tokenize_unit`, but a unit that keeps killing its worker ends in quarantine. Exceptions pass through."""
    storage = open_storage(settings.storage)
    done = read_record(storage, shard_path("units", unit.id, ".json"), UnitManifest)
    if done is not None:
        return done
    folder = shard_path("attempts", unit.id, "")
    unfinished = len(storage.list(folder))
    if unfinished >= UNFINISHED_ATTEMPTS:
        manifest = _tokenize_alone(storage, settings, unit)
    else:
        storage.create(f"{folder}/{unfinished}", b"")
        try:
            manifest = tokenize_unit(settings, unit)
        except Exception:
            storage.delete(f"{folder}/{unfinished}")  # it ended, and said why
            raise
    storage.delete(folder)
    return manifest


def forget_attempts(storage: Storage, unit_ids: Iterable[str]) -> None:
    """Remove the markers of units that are all committed: of a worker that died after its commit, one is left."""
    committed = {shard_path("attempts", unit_id, "") for unit_id in unit_ids}
    for entry in storage.list("datasets/attempts"):
        folder = entry.path.rpartition("/")[0]
        if folder in committed:
            storage.delete(folder)


def _tokenize_alone(storage: Storage, settings: TokenizeSettings, unit: Unit) -> UnitManifest:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
    for _ in range(CHILD_DEATHS):
        code, error = _in_child(settings, unit, environment)
        if code == 0:
            path = shard_path("units", unit.id, ".json")
            return UnitManifest.parse(storage.read(path), storage.uri(path))
        if code > 0 and not error.startswith("MemoryError"):
            raise RuntimeError(f"unit {unit.id}: {error}")
    died = f"signal {signal.Signals(-code).name}" if code < 0 else "MemoryError"
    return _quarantine(storage, settings, unit, f"killed its worker {CHILD_DEATHS} times in isolation, last by {died}")


def _in_child(settings: TokenizeSettings, unit: Unit, environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and last line of a child that does the unit. A classifier that is not in the process already is asked by this one, which has
    a way to its actors. Raises ConfigError as the unit's task does."""
    asks = settings.classify is not in_process
    given = pickle.dumps((replace(settings, classify=in_process), unit, asks))
    with TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "data_prep.attempts"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        refusal = ""
        with contextlib.suppress(BrokenPipeError, EOFError), child.stdout, child.stdin:  # it may die at any moment
            child.stdin.write(given)
            child.stdin.flush()
            while isinstance(said := pickle.load(child.stdout), tuple):
                pickle.dump(settings.classify(*said), child.stdin)
                child.stdin.flush()
            refusal = said
        code = child.wait()
        if refusal:
            raise ConfigError(refusal)
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
    return code, lines[-1] if lines else ""


def _quarantine(storage: Storage, settings: TokenizeSettings, unit: Unit, why: str) -> UnitManifest:
    files = [f"{part.path}[{part.start}:{'' if part.stop is None else part.stop}]" for part in unit.slices]
    line = {"location": f"unit {unit.id}", "reason": REASON, "excerpt": why, "slices": files}
    with TemporaryDirectory(prefix="unit-") as local:
        path = Path(local) / "quarantine.jsonl"
        path.write_bytes(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        entry = put(storage, path, shard_path("quarantine", unit.id, ".jsonl"))
    manifest = UnitManifest(
        id=unit.id,
        source=unit.source,
        slices=tuple(asdict(part) for part in unit.slices),
        settings=settings.unit_settings,
        counts=DocumentCounts(docs_in=1, docs_out=0, heldout=0, filtered={}, quarantined={REASON: 1}),
        tokens=0,
        text_bytes=0,
        documents=None,
        index=None,
        candidates=None,
        quarantine=entry,
        cross_checked=0,
        failed=why,
        versions=settings.versions,
    )
    storage.create(manifest.path, manifest.to_json())
    return manifest


def _main() -> None:
    """The child: dies with its parent, and of more memory than a unit can need rather than of the whole node's."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    resource.setrlimit(resource.RLIMIT_DATA, (CHILD_MEMORY_BYTES, CHILD_MEMORY_BYTES))
    settings, unit, asks = pickle.load(sys.stdin.buffer)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no message to the parent
    if asks:
        settings = replace(settings, classify=partial(_ask, answers))
    refusal = ""
    try:
        tokenize_unit(settings, unit)
    except ConfigError as error:
        refusal = str(error)
    _say(answers, refusal)


def _ask(answers: IO[bytes], settings: Classifier, batches: Sequence[Sequence[str]]) -> Any:
    _say(answers, (settings, batches))
    return pickle.load(sys.stdin.buffer)


def _say(answers: IO[bytes], message: Any) -> None:
    pickle.dump(message, answers)
    answers.flush()


if __name__ == "__main__":
    _main()
