"""JSON Lines: a document a line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from data_prep.plan import Slice
from data_prep.readers import compression
from data_prep.readers.record import (
    DATA_ERRORS,
    EXCERPT_BYTES,
    ReaderSettings,
    Record,
    corrupt,
    from_json,
)


def read_json_lines(part: Slice, file: IO[bytes], settings: ReaderSettings) -> Iterator[Record]:
    for offset, line, problem in lines(part, file, settings.max_document_bytes):
        location = f"{part.path}@{offset}"
        if problem:
            yield Record(location, reason=problem, excerpt=bytes(line))
        elif record := from_json(line, location, settings):
            yield record


def lines(part: Slice, file: IO[bytes], limit: int) -> Iterator[tuple[int, bytes | memoryview, str]]:
    """(offset, line, problem) of lines that begin in the slice.

    problem is "", "too_large" (the line is its first bytes) or "corrupt_file" (the line is the error: the file breaks here).
    """
    offset = part.start
    if part.start:
        # a line that begins exactly at `start` is ours: the byte before is its predecessor's end
        file.seek(part.start - 1)
        offset -= 1
    stream = file if part.start else compression.decompressed(part.path, file)
    pending: list[bytes] = []  # pieces of a line that is not complete yet; of one over the limit its beginning
    pending_size, line_start, skip = 0, offset, bool(part.start)
    while True:
        try:
            chunk = stream.read(compression.READ_BYTES)
        except DATA_ERRORS as error:
            yield line_start, corrupt("", error).excerpt, "corrupt_file"
            return
        view, position = memoryview(chunk), 0
        while (end := chunk.find(b"\n", position)) >= 0:
            size = pending_size + end - position
            if not skip:
                whole = b"".join([*pending, view[position:end]]) if pending else view[position:end]
                yield (line_start, whole, "") if size <= limit else (line_start, whole[:EXCERPT_BYTES], "too_large")
            pending, pending_size, skip, position = [], 0, False, end + 1
            line_start = offset + position
            if part.stop is not None and line_start >= part.stop:
                return
        pending_size += len(chunk) - position
        if skip:
            pending = []
        elif pending_size > limit:
            pending = [b"".join([*pending, chunk[position : position + EXCERPT_BYTES]])[:EXCERPT_BYTES]]
        elif position < len(chunk):
            pending.append(chunk[position:])
        offset += len(chunk)
        if not chunk:
            break
    if not skip and pending_size:
        whole = b"".join(pending)
        yield (line_start, whole, "") if pending_size <= limit else (line_start, whole, "too_large")
