"""Arrow IPC, as a stream (what Hugging Face datasets save) or as a file (Feather version 2): one reader for both.

The file form is a stream behind eight bytes, with a footer of places after its end (Arrow columnar format, IPC File
Format), and is read as that stream. pyarrow reads a record batch whole, so each message is looked at before: 8 bytes, then
a flatbuffer `Message` that tells what follows and how large (format/Message.fbs). Batches over the limit are passed over.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import pyarrow as pa

from data_prep.plan import Slice
from data_prep.readers.columns import records, wanted_columns
from data_prep.readers.record import ReaderSettings, Record, corrupt

MAGIC = b"ARROW1\x00\x00"
OLD_FEATHER = b"FEA1"
SLICE_ROWS = 512
BATCH_BYTES = 512 * 1024 * 1024  # larger record batches are not read
CONTINUATION = b"\xff\xff\xff\xff"
RECORD_BATCH = 3  # of the kinds of message
_BINARY_OF = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}


def read_arrow(part: Slice, file: IO[bytes], settings: ReaderSettings) -> Iterator[Record]:
    head = file.read(8)
    if head.startswith(OLD_FEATHER):
        message = b"Feather version 1: read it with pandas, and write it as version 2 or as Parquet"
        yield Record(f"{part.path}#0", reason="corrupt_file", excerpt=message)
        return
    begin = 8 if head == MAGIC else 0
    row = 0
    try:
        schema = pa.ipc.open_stream(pa.PythonFile(_Messages(file, begin), "r")).schema
        columns = [schema.names.index(_top(name, schema)) for name in wanted_columns(schema, settings)]
        messages = _Messages(file, begin)
        options = pa.ipc.IpcReadOptions(included_fields=sorted(set(columns)), use_threads=False)
        reader = pa.ipc.open_stream(pa.PythonFile(messages, "r"), options=options)
        while True:
            batch = next(reader, None)
            for rows, size in messages.passed_over:
                excerpt = f"a record batch of {size:,} bytes; at most {BATCH_BYTES:,} are read: write smaller ones"
                yield Record(f"{part.path}#{row}", reason="batch_too_large", excerpt=excerpt.encode())
                row += rows
            messages.passed_over = []
            if batch is None:
                break
            batch = _validated(batch)
            for start in range(0, batch.num_rows, SLICE_ROWS):
                yield from records(part.path, row + start, batch.slice(start, SLICE_ROWS), schema, settings)
            row += batch.num_rows
        if not messages.ended:
            raise pa.ArrowInvalid("the file ends without the mark that ends a stream of record batches")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowKeyError, OSError) as error:
        yield corrupt(f"{part.path}#{row}", error)


def _top(name: str, schema: pa.Schema) -> str:
    return name if name in schema.names else name.partition(".")[0]


def _validated(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Offsets and indices are within their buffers, or ArrowInvalid. Text is looked at as bytes: one that is not UTF-8 costs itself."""
    columns = [column.view(_BINARY_OF.get(column.type, column.type)) for column in batch.columns]
    bare = pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
    bare.validate(full=True)
    return bare


@dataclass
class _Message:
    kind: int
    end: int  # position
    rows: int
    size: int  # bytes of the body, decompressed


class _Messages:
    """A stream of messages without the record batches over BATCH_BYTES, as the file that pyarrow reads."""

    closed = False

    def __init__(self, file: IO[bytes], begin: int) -> None:
        self.passed_over: list[tuple[int, int]] = []  # rows and bytes of batches since the last that was read
        self.ended = False
        self._file = file
        self._next = begin  # position of the next message
        file.seek(begin)

    def read(self, size: int) -> bytes:
        while self._file.tell() == self._next:
            message = self._message()
            if message is None:
                break
            self._next = message.end
            if message.kind != RECORD_BATCH or message.size <= BATCH_BYTES:
                break
            self.passed_over.append((message.rows, message.size))
            self._file.seek(message.end)
        return self._file.read(size)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        pass

    def _message(self) -> _Message | None:
        """The message that begins here, the position unchanged; None where there is none: the end."""
        begin = self._file.tell()
        prefix = self._file.read(8)
        length = (
            struct.unpack("<i", prefix[4:8] if prefix[:4] == CONTINUATION else prefix[:4])[0] if len(prefix) == 8 else 0
        )
        if length <= 0:
            self.ended = len(prefix) >= 4 and length == 0
            self._file.seek(begin)
            return None
        body = begin + (8 if prefix[:4] == CONTINUATION else 4) + length
        self._file.seek(body - length)
        metadata = self._file.read(length)
        try:
            message = _Table(metadata, struct.unpack_from("<I", metadata)[0])
            kind, size = message.integer(1, "<B"), message.integer(3, "<q")
            found = _Message(kind, body + size, 0, size)
            if kind == RECORD_BATCH and (batch := message.table(2)):
                found.rows = batch.integer(0, "<q")
                found.size = max(size, sum(self._decompressed(body, batch)))
        except struct.error as error:
            raise pa.ArrowInvalid(f"no message at byte {begin}: {error}") from error
        self._file.seek(begin)
        return found

    def _decompressed(self, body: int, batch: _Table) -> Iterator[int]:
        """Bytes of each buffer, of which the first eight tell, where the batch is compressed."""
        if batch.table(3) is None:
            return
        for offset, length in batch.pairs(2):
            if length >= 8:
                self._file.seek(body + offset)
                yield max(struct.unpack("<q", self._file.read(8))[0], length)


class _Table:
    """A flatbuffer table: fields by number, through its vtable. Raises struct.error outside of the data."""

    def __init__(self, data: bytes, position: int) -> None:
        self._data, self._position = data, position
        self._vtable = position - struct.unpack_from("<i", data, position)[0]
        self._vtable_bytes = struct.unpack_from("<H", data, self._vtable)[0]

    def integer(self, number: int, kind: str) -> int:
        place = self._place(number)
        return int(struct.unpack_from(kind, self._data, place)[0]) if place else 0

    def table(self, number: int) -> _Table | None:
        place = self._place(number)
        return _Table(self._data, place + struct.unpack_from("<I", self._data, place)[0]) if place else None

    def pairs(self, number: int) -> Iterator[tuple[int, int]]:
        """A vector of structs of two int64."""
        place = self._place(number)
        if place:
            vector = place + struct.unpack_from("<I", self._data, place)[0]
            for index in range(struct.unpack_from("<I", self._data, vector)[0]):
                yield struct.unpack_from("<qq", self._data, vector + 4 + 16 * index)

    def _place(self, number: int) -> int:
        """0 for a field that is not there."""
        slot = 4 + 2 * number
        offset = struct.unpack_from("<H", self._data, self._vtable + slot)[0] if slot < self._vtable_bytes else 0
        return self._position + offset if offset else 0
