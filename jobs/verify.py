"""Prove a dataset: every checksum, count and invariant (pipeline/dataset/verify.py), in parallel on Ray.

    python -m jobs.verify --config <preset or path> [--dataset <identity>] [section.key=value ...]

One line per damaged file and row group, progress while it runs, one line of result. Exit code 0: everything is as the
manifest says; 1: something is not; 2: wrong configuration, or no such dataset.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

import pyarrow as pa
import ray

from jobs.cli import parser
from jobs.cluster import connect
from jobs.dataset import open_dataset
from pipeline.config.load import load_config
from pipeline.config.schema import StorageConfig
from pipeline.dataset.checks import FileReport, Task, check
from pipeline.dataset.leakage import HeldoutIndex
from pipeline.dataset.verify import VerifyReport, verify
from pipeline.manifest import DatasetManifest
from pipeline.storage import Storage, open_storage

SECONDS_BETWEEN_LINES = 10.0


def main(arguments: list[str] | None = None) -> int:
    made = parser(
        "verify",
        "Prove a dataset: every checksum, count and invariant. Exit code 0: sound; 1: damaged; 2: no such dataset.",
    )
    made.add_argument("--dataset", help="identity; default: the dataset of this configuration")
    parsed = made.parse_args(arguments)
    with contextlib.ExitStack() as cluster:
        try:
            config = load_config(parsed.config, parsed.overrides)
            storage = open_storage(config.storage)
            dataset = open_dataset(config, storage, parsed.dataset)
            if not ray.is_initialized():
                cluster.enter_context(connect(config))
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        result = verify(dataset, storage, map_tasks=on_ray, report=Progress(dataset))
    print(summary(dataset, result))
    return 0 if result.ok else 1


def on_ray(
    dataset: DatasetManifest, heldout: HeldoutIndex, storage: Storage, tasks: list[Task]
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
    return check(DatasetManifest.model_validate_json(dataset), heldout, open_storage(storage), task)


class Progress:
    """Prints damage at once, and how far the checks are every few seconds."""

    def __init__(self, dataset: DatasetManifest) -> None:
        self._total = sum(file.bytes for source in dataset.sources for file in (*source.packed, *source.documents))
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
        left = max(0.0, self._total - self._bytes) / max(rate, 1e-9)
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


if __name__ == "__main__":
    sys.exit(main())
