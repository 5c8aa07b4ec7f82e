"""TensorBoard: event files in the run's storage, written with tensorboardX, which Ray brings.

    <root>/runs/<run_id>/train/tensorboard/events.out.tfevents.<time>.<first step>.moonlight

`tensorboard --logdir <root>/runs` shows all runs side by side. A file is written whole, and another one begun after RECORDS
records. What the files have is read from them; steps that a run does again after a crash are the same ones and are not written twice.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from pipeline.config.schema import RunConfig
from pipeline.storage import Storage
from pipeline.tracking.tracker import RunName
from pipeline.training.commits import train_folder

RECORDS = 500


def open_run(config: RunConfig, storage: Storage, name: RunName) -> TensorBoard:
    return TensorBoard(storage, f"{train_folder(config.run_id)}/{folder_name(config, name)}")


def folder_name(config: RunConfig, name: RunName) -> str:
    return "tensorboard" if name.name == config.run_id else f"tensorboard-{name.name}"


class TensorBoard:
    def __init__(self, storage: Storage, folder: str) -> None:
        self._storage, self._folder = storage, folder
        self._name, self._lines = "", [_framed(Event(wall_time=time.time(), file_version="brain.Event:2"))]
        data = [storage.read_or_none(f"{folder}/{name}") or b"" for name in storage.names(folder)]
        self.last_step = max((event.step for text in data for event in events(text)), default=0)

    def add(self, step: int, time: float, values: dict[str, float]) -> None:
        if len(self._lines) > RECORDS:
            self.flush()
            self._name, self._lines = "", self._lines[:1]
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._lines.append(_framed(Event(wall_time=time, step=step, summary=Summary(value=scalars))))
        self._name = self._name or f"events.out.tfevents.{int(time):010d}.{step:012d}.moonlight"

    def flush(self) -> None:
        if self._name:
            self._storage.write(f"{self._folder}/{self._name}", b"".join(self._lines))

    def close(self) -> None:
        """Nothing is open."""


def _framed(event: Event) -> bytes:
    """A record: length, its checksum, the event, its checksum."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


def events(data: bytes) -> Iterator[Event]:
    """Of an event file. A torn record ends it."""
    at = 0
    while at + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        if at + 16 + length > len(data):
            return
        yield Event.FromString(data[at + 12 : at + 12 + length])
        at += 16 + length
