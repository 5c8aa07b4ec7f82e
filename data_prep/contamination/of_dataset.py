"""Over all units of a dataset version: how many documents each question was found in.

datasets/<identity>/seen.parquet          a row a question that was seen: task, key, documents
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.contamination.finder import Finder
from data_prep.contamination.questions import read_questions
from data_prep.contamination.seen import SEEN
from data_prep.records import UnitManifest
from data_prep.resolve import READ_THREADS
from pipeline.config.schema import Decontamination
from pipeline.integrity import read_checked
from pipeline.manifest import Contamination, FileEntry, TaskContamination
from pipeline.storage import Storage


def contamination_of(
    storage: Storage, settings: Decontamination, entry: FileEntry, units: Sequence[UnitManifest], folder: str
) -> Contamination:
    """Of all units of a dataset version, whose folder is `folder`."""
    questions = read_questions(storage, entry)
    documents = np.zeros(len(questions), np.int64)

    def load(file: FileEntry) -> np.ndarray:
        return np.frombuffer(read_checked(storage, file), SEEN)

    with ThreadPoolExecutor(READ_THREADS) as pool:
        for found in pool.map(load, [unit.seen for unit in units if unit.seen]):
            documents[found["question"]] += found["documents"]
    places = np.flatnonzero(documents)
    rows = {
        "task": [questions.tasks[questions.task[place]] for place in places],
        "key": [questions.keys[place] for place in places],
        "documents": documents[places],
    }
    schema = pa.schema([("task", pa.string()), ("key", pa.string()), ("documents", pa.int64())])
    buffer = io.BytesIO()
    pq.write_table(pa.table(rows, schema), buffer, compression="zstd")
    data, path = buffer.getvalue(), f"{folder}/seen.parquet"
    storage.write(path, data)
    by_task: Counter[str] = Counter()
    for unit in units:
        by_task.update(unit.contaminated)
    looked_for = Finder(questions, settings).looked_for
    tasks = {}
    for number, name in enumerate(questions.tasks):
        mine = questions.task == number
        tasks[name] = TaskContamination(
            questions=int(mine.sum()),
            looked_for=int((mine & looked_for).sum()),
            seen=int((mine & (documents > 0)).sum()),
            documents=by_task[name],
        )
    return Contamination(
        rule=settings.rule,
        ngram=settings.n,
        action=settings.action,
        questions=entry,
        seen=FileEntry(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()),
        tasks=tasks,
    )
