"""A file is a document, without fields: it meets no condition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from data_prep.plan import Slice
from data_prep.readers.compression import decompressed
from data_prep.readers.record import (
    DATA_ERRORS,
    EXCERPT_BYTES,
    MISSING,
    ReaderSettings,
    Record,
    checked,
    corrupt,
    judged,
)


def read_text(part: Slice, file: IO[bytes], settings: ReaderSettings) -> Iterator[Record]:
    limit = settings.max_document_bytes
    pieces: list[bytes] = []
    size = 0
    try:
        stream = decompressed(part.path, file)
        while size <= limit and (piece := stream.read(limit + 1 - size)):
            pieces.append(piece)
            size += len(piece)
    except DATA_ERRORS as error:
        yield corrupt(part.path, error)
        return
    text = b"".join(pieces)
    if size > limit:
        yield Record(part.path, reason="too_large", excerpt=text[:EXCERPT_BYTES])
    else:
        record = checked(Record(part.path, text, part.path))
        yield judged(record, settings.where, [MISSING] * len(settings.where))
