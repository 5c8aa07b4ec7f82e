"""Weights & Biases: one run there for one run here, online or as offline files for `wandb sync`.

Its server knows how far a run is when it is resumed; offline nobody does, so the files that earlier attempts left are read. Those
are LevelDB logs (blocks of 32 KiB; chunks of checksum, length and kind) of W&B's own protobuf records.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb
from wandb.proto import wandb_internal_pb2

from pipeline.config.schema import RunConfig
from pipeline.storage import Storage
from pipeline.tracking.tracker import RunName, folder_of

HEADER, BLOCK = 7, 32 * 1024  # bytes: of a file and of each chunk; from the file's begin
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4  # kinds of chunks


def check_credentials() -> None:
    """Raises ValueError if there is no key for the server."""
    if not wandb.api.api_key:
        raise ValueError(
            "tracking.trackers: wandb has no credentials; run `wandb login`, set WANDB_API_KEY, or set tracking.offline=true"
        )


def open_run(config: RunConfig, storage: Storage, name: RunName) -> WandB:
    return WandB(config, folder_of(config, storage), name)


class WandB:
    def __init__(self, config: RunConfig, folder: Path, name: RunName) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        offline = config.tracking.offline
        before = last_step(folder, name.key)
        if not offline:
            check_credentials()
        self._run: Any = wandb.init(
            project=name.project,
            entity=config.tracking.entity,
            id=name.key,
            name=name.name,
            group=config.run_id,
            dir=folder,
            config=config.model_dump(mode="json"),
            mode="offline" if offline else "online",
            resume="allow",
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True),
        )
        self._run.define_metric("*", step_metric="train/global_step")
        self.last_step = before if offline else max(int(self._run.starting_step) - 1, 0)

    def add(self, step: int, time: float, values: dict[str, float]) -> None:
        self._run.log({**values, "train/global_step": step, "_timestamp": time}, step=step)

    def flush(self) -> None:
        """W&B's own process sends, now and when its server is back."""

    def close(self) -> None:
        self._run.finish()


def last_step(folder: Path, key: str) -> int:
    """The newest step in the offline files of a run."""
    files = (folder / "wandb").glob(f"offline-run-*-{key}/run-{key}.wandb")
    return max((step for file in files for step, _ in history(file)), default=0)


def history(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(step, values as JSON) of each row of a run's file."""
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            row = record.history
            yield row.step.num, {item.key or ".".join(item.nested_key): item.value_json for item in row.item}


def records(log: bytes) -> Iterator[bytes]:
    """Of a LevelDB log behind its header. What is torn at the end is left out."""
    at, parts = HEADER, b""
    while at + HEADER <= len(log):
        if BLOCK - at % BLOCK < HEADER:  # no chunk begins in what is left of a block
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", log, at)
        chunk = log[at + HEADER : at + HEADER + length]
        if kind not in (FULL, FIRST, MIDDLE, LAST) or len(chunk) < length:
            return
        at += HEADER + length
        parts = chunk if kind in (FULL, FIRST) else parts + chunk
        if kind in (FULL, LAST):
            yield parts
