"""The checks of a dataset (pipeline/dataset/verify.py) as Ray tasks: a line per damaged file or row group, progress, a line of result."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import lru_cache

import pyarrow as pa
import ray

from jobs.on_ray.cluster import connect
from pipeline.config.schema import RunConfig, StorageConfig
from pipeline.dataset.checks import FileReport, Task, check
from pipeline.dataset.leakage import HeldoutIndex
from pipeline.dataset.verify import VerifyReport, verify
from pipeline.file_index import FileIndex, open_index
from pipeline.manifest import DatasetManifest
from pipeline.storage import Storage, open_storage

SECONDS_BETWEEN_LINES = 10.0


def verify_on_ray(config: RunConfig, dataset: DatasetManifest, storage: Storage) -> int:
    """Check the dataset on the Ray cluster at hand. Returns the exit code: 0 sound, 1 damaged."""
    with contextlib.nullcontext() if ray.is_initialized() else connect(config):
        result = verify(dataset, storage, map_tasks=on_ray, report=Progress())
    print(summary(dataset, result))
    return 0 if result.ok else 1


def on_ray(
    dataset: DatasetManifest, index: FileIndex, heldout: HeldoutIndex, storage: Storage, tasks: list[Task]
) -> Iterator[FileReport]:
    """Checks each file in a Ray task on an initialised Ray; at most two per core wait at a time."""
    shared = ray.put((dataset.to_json(), heldout, storage.config))
    remote = ray.remote(num_cpus=1, max_retries=3)(_check)
    waiting = list(reversed(tasks))
    running: list[ray.ObjectRef] = []
    while waiting or running:
        room = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        while waiting and len(running) < room:
            running.append(remote.remote(shared, waiting.pop()))
        done, running = ray.wait(running)
        yield from ray.get(done)


def _check(shared: tuple[bytes, HeldoutIndex, StorageConfig], task: Task) -> FileReport:
    pa.set_cpu_count(1)
    dataset, heldout, storage = shared
    manifest, index = _opened(dataset, storage)
    return check(manifest, index, heldout, open_storage(storage), task)


@lru_cache(maxsize=1)
def _opened(dataset: bytes, storage: StorageConfig) -> tuple[DatasetManifest, FileIndex]:
    """Once a worker: of a large dataset the index has 60 MB."""
    manifest = DatasetManifest.model_validate_json(dataset)
    return manifest, open_index(open_storage(storage), manifest)


class Progress:
    """Prints damage at once, and how far the checks are every few seconds."""

    def __init__(self) -> None:
        self._bytes = 0
        self._start = self._printed = time.monotonic()

    def __call__(self, done: int, total: int, file: FileReport) -> None:
        self._bytes += file.bytes
        for finding in file.findings:
            print(f"verify: DAMAGED {finding}", flush=True)
        now = time.monotonic()
        if done < total and now - self._printed < SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        rate = self._bytes / max(now - self._start, 1e-9)
        left = (now - self._start) / done * (total - done)
        print(
            f"verify: {done}/{total} checks, {self._bytes / 1e6:,.1f} MB ({rate / 1e6:,.1f} MB/s), {left:,.0f} s left",
            flush=True,
        )


def summary(dataset: DatasetManifest, result: VerifyReport) -> str:
    facts = f"{result.files} files, {result.bytes:,} bytes, {result.rows:,} rows, {result.tokens:,} tokens"
    if result.ok:
        return f"verify: dataset {dataset.identity} is sound: {facts}"
    return "\n".join(
        [
            *(f"verify: {finding}" for finding in result.findings),
            f"verify: dataset {dataset.identity} is NOT sound: {facts}",
        ]
    )
