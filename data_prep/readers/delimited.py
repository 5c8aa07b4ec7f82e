"""CSV and TSV with a header row, as RFC 4180 and Python's csv module have them. Streamed, a row at a time.

A row may go over lines inside quotes. Fields are found by one regular expression over bytes: places are byte offsets, a text
that is not UTF-8 costs its row, and of a row over the limit nothing is held. After a row that breaks the rules (a quote that
is never closed meets the next one there) reading goes on with the next line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO, Any

from data_prep.plan import Slice
from data_prep.readers import compression
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
from pipeline.config.conditions import Condition

DELIMITERS = {"csv": b",", "tsv": b"\t"}
BOM = b"\xef\xbb\xbf"
_QUOTE = b'"'
_IN_QUOTES = re.compile(rb'(?:[^"]++|"")*+')


def read_delimited(part: Slice, file: IO[bytes], settings: ReaderSettings, delimiter: bytes) -> Iterator[Record]:
    rows = _Rows(delimiter, settings.max_document_bytes)
    names: list[str] | None = None
    text_at = id_at = -1
    where: list[int] = []
    try:
        for offset, row, problem, excerpt in rows.of(compression.decompressed(part.path, file)):
            location = f"{part.path}@{offset}"
            if problem:
                yield Record(location, reason=problem, excerpt=excerpt)
            elif names is None:
                names = [name.decode(errors="backslashreplace") for name in [row[0].removeprefix(BOM), *row[1:]]]
                wanted = (settings.text_field, settings.id_field)
                text_at, id_at = (names.index(name) if name in names else -1 for name in wanted)
                where = [names.index(one.field) if one.field in names else -1 for one in settings.where]
            elif len(row) != len(names):
                message = f"{len(row)} fields where the header has {len(names)}: ".encode()
                yield Record(location, reason="invalid_csv", excerpt=(message + excerpt)[:EXCERPT_BYTES])
            elif text_at < 0:
                message = f"the columns are {', '.join(names)}".encode()
                yield Record(location, reason="missing_field", excerpt=message[:EXCERPT_BYTES])
            elif not row[text_at]:
                yield Record(location, reason="empty_document", excerpt=excerpt)
            else:
                doc_id = row[id_at].decode(errors="backslashreplace") if id_at >= 0 else ""
                record = checked(Record(location, row[text_at], doc_id or location))
                values = [_value(row[at], one) if at >= 0 else MISSING for at, one in zip(where, settings.where)]
                yield judged(record, settings.where, values)
    except DATA_ERRORS as error:
        yield corrupt(f"{part.path}@{rows.offset}", error)


def _value(cell: bytes, condition: Condition) -> Any:
    """What a cell means to a condition; nothing is null."""
    text = cell.decode(errors="backslashreplace")
    if not text:
        return None
    if condition.kind == "boolean":
        return {"true": True, "false": False}.get(text.lower(), text)
    if condition.kind == "number":
        try:
            return int(text) if text.lstrip("+-").isdecimal() else float(text)
        except ValueError:
            return text
    return text


class _Rows:
    def __init__(self, delimiter: bytes, limit: int) -> None:
        self.offset = 0  # of the row at hand
        self._limit = limit
        self._delimiter = delimiter
        self._bare = re.compile(rb"[^%b\r\n]*+" % delimiter)
        self._field = re.compile(rb'(?:"((?:[^"]++|"")*+)"|((?!")[^%b\r\n]*+))(%b|\r?\n)' % (delimiter, delimiter))
        self._buffer = b""
        self._place = 0  # offset of the buffer
        self._ended = False

    def of(self, stream: Any) -> Iterator[tuple[int, list[bytes], str, bytes]]:
        """(offset, fields, problem, first bytes) of each row that is not blank."""
        position = 0
        while True:
            if position == len(self._buffer):
                if not self._more(stream, position):
                    return
                position = 0
            start, fields, problem = position, list[bytes](), ""
            self.offset = self._place + start
            bare = False
            while True:
                found = self._field.match(self._buffer, position)
                if found is not None:
                    quoted = found[1]
                    bare = quoted is None
                    fields.append(found[2] if quoted is None else quoted.replace(b'""', _QUOTE))
                    position = found.end()
                    if found[3] == self._delimiter:
                        continue
                    break
                if (broken := self._broken_at(position)) >= 0:
                    problem, position = "invalid_csv", self._buffer.find(b"\n", broken) + 1 or len(self._buffer)
                    break
                if len(self._buffer) - start > self._limit:
                    problem = "too_large"
                    break
                position -= start
                self._more(stream, start)
                start = 0
            excerpt = self._buffer[start : min(position, start + EXCERPT_BYTES)].rstrip(b"\r\n")
            if problem == "too_large":
                excerpt = self._buffer[start : start + EXCERPT_BYTES]
                position = self._after(stream, position)
            elif position - start > self._limit + 2:
                problem = "too_large"
            if problem or len(fields) > 1 or fields[0] or not bare:
                yield self.offset, fields, problem, excerpt

    def _more(self, stream: Any, keep: int) -> bool:
        """Forget what is before `keep` and read on, as much again as is kept. At the end of the file a line ends, too."""
        kept = self._buffer[keep:]
        self._place += keep
        data = b"" if self._ended else stream.read(max(compression.READ_BYTES, len(kept)))
        if not data and not self._ended:
            self._ended = True
            data = b"" if not kept or kept.endswith(b"\n") else b"\n"
        self._buffer = kept + data
        return bool(data)

    def _broken_at(self, position: int) -> int:
        """Where the field that begins here breaks the rules; -1 if more of the file may make it whole."""
        end = len(self._buffer)
        if self._buffer[position : position + 1] == _QUOTE:
            closing = _IN_QUOTES.match(self._buffer, position + 1).end()  # type: ignore[union-attr]  # matches nothing, too
            after = closing + 1
        else:
            after = self._bare.match(self._buffer, position).end()  # type: ignore[union-attr]
        whole = after < end and self._buffer[after : after + 2] != b"\r"
        return min(after, end) if whole or self._ended else -1

    def _after(self, stream: Any, position: int) -> int:
        """Where the next row begins, from within a field, holding no more than a piece of the file."""
        quoted = self._buffer[position : position + 1] == _QUOTE
        position += quoted
        while True:
            inside = _IN_QUOTES if quoted else self._bare
            position = inside.match(self._buffer, position).end()  # type: ignore[union-attr]
            while position + 1 >= len(self._buffer):
                if not self._more(stream, position):
                    return len(self._buffer)
                position = 0
                position = inside.match(self._buffer, position).end()  # type: ignore[union-attr]
            if quoted:  # at the closing quote
                quoted, position = False, position + 1
            elif self._buffer[position : position + 1] == self._delimiter:
                quoted = self._buffer[position + 1 : position + 2] == _QUOTE
                position += 1 + quoted
            else:
                return position + 1  # of \r\n the \n is left: a blank row
