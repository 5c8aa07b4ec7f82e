"""The questions that are looked for, as hashes of their normalised words: a file named by its own sha256, so that tasks of the same
content are the same questions, in whatever run.

    datasets/questions/ab/<sha256>.parquet      a row a question: task, key (the harness's hash of it), parts

A part is a text that counts by itself: the prompt with the answer, and every field of the question that stands in the prompt as it is, for
a template's words (`Question:`) are not in a corpus. A question is seen where one of its parts is. No text is kept, only 64 bits a word.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.near.signatures import word_hashes
from data_prep.records import shard_path
from data_prep.rules.hashing import Hashes
from pipeline.config.load import ConfigError
from pipeline.config.schema import Decontamination
from pipeline.integrity import read_checked
from pipeline.manifest import FileEntry
from pipeline.storage import Storage

SCHEMA = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("parts", pa.list_(pa.list_(pa.uint64())), nullable=False),
    ]
)
Texts = Mapping[str, Sequence[tuple[str, Sequence[str]]]]
"""Of each task its questions: (key, texts of the parts)."""


@dataclass(frozen=True)
class Questions:
    """Question i is of task `tasks[task[i]]`; its parts are words [first[p], first[p + 1]) of `words` for p with owner[p] = i."""

    tasks: tuple[str, ...]
    task: np.ndarray  # [questions]
    keys: tuple[str, ...]
    owner: np.ndarray  # [parts]
    first: np.ndarray  # [parts + 1]
    words: Hashes

    def __len__(self) -> int:
        return len(self.keys)


def write_questions(storage: Storage, texts: Texts) -> str:
    """Store them, unless they are there. Returns their sha256."""
    data = to_bytes(texts)
    sha256 = hashlib.sha256(data).hexdigest()
    storage.create(questions_path(sha256), data)
    return sha256


def questions_path(sha256: str) -> str:
    return shard_path("questions", sha256, ".parquet")


def to_bytes(texts: Texts) -> bytes:
    columns: dict[str, list[object]] = {name: [] for name in SCHEMA.names}
    for task in sorted(texts):
        for key, parts in texts[task]:
            words, first = word_hashes(parts)
            each = [words[start:stop] for start, stop in zip(first[:-1], first[1:])]
            different = {part.tobytes(): part for part in each if len(part)}
            for name, value in zip(SCHEMA.names, (task, key, list(different.values()))):
                columns[name].append(value)
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def parse(data: bytes) -> Questions:
    table = pq.read_table(io.BytesIO(data), schema=SCHEMA).combine_chunks()
    names = table["task"].to_pylist()
    tasks = tuple(dict.fromkeys(names))
    number = {name: place for place, name in enumerate(tasks)}
    parts = table["parts"].chunk(0) if len(table) else pa.array([], SCHEMA.field("parts").type)
    counts = np.diff(parts.offsets.to_numpy())
    words = parts.flatten()
    return Questions(
        tasks,
        np.array([number[name] for name in names], np.int64),
        tuple(table["key"].to_pylist()),
        np.repeat(np.arange(len(table)), counts),
        words.offsets.to_numpy().astype(np.int64) if len(words) else np.zeros(1, np.int64),
        words.flatten().to_numpy(zero_copy_only=False).astype(np.uint64),
    )


def find_questions(storage: Storage, settings: Decontamination | None) -> FileEntry | None:
    """Those that the settings name; None where none are looked for. Raises ConfigError if they are not there."""
    if settings is None:
        return None
    data = storage.read_or_none(questions_path(settings.questions)) if settings.questions else None
    if data is None:
        asked = (
            f"{settings.questions}: not at {storage.uri(questions_path(settings.questions))}"
            if settings.questions
            else "null"
        )
        raise ConfigError(
            f"corpus.decontamination.questions {asked}; leave it out, and `moonlight prepare` asks the evaluation's tasks for them"
        )
    return FileEntry(path=questions_path(settings.questions or ""), bytes=len(data), sha256=str(settings.questions))


def read_questions(storage: Storage, entry: FileEntry) -> Questions:
    """Raises DamagedFile."""
    return parse(read_checked(storage, entry))
