"""JSON that is not one document a line: an array of documents, or documents spread over lines. Streamed.

Nothing is parsed before its end is known: a scan over quotes and brackets finds where each element ends, and orjson reads
the element alone. So an element that is damaged or too large costs itself, memory is one element, and places are byte
offsets, as of lines. Bytes that break the structure itself (a quote too many) cost what follows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO

import orjson

from data_prep.formats import compression_of
from data_prep.plan import Slice
from data_prep.readers import compression
from data_prep.readers.record import DATA_ERRORS, EXCERPT_BYTES, ReaderSettings, Record, corrupt, from_json

HEAD_BYTES = 64 * 1024
BOM = b"\xef\xbb\xbf"
_STRUCTURE = re.compile(rb'["\[\]{}]')
_STRUCTURE_OR_COMMA = re.compile(rb'["\[\]{},]')
_QUOTE, _COMMA = b'",'
_OPEN, _CLOSE = b"[{", b"]}"


def is_json_lines(path: str, file: IO[bytes]) -> bool:
    """Whether a file that is not compressed may be cut at line ends. By its first bytes."""
    head = file.read(HEAD_BYTES)
    file.seek(0)
    return compression_of(path, head) is None and _lines_begin(head)


def are_lines(path: str, file: IO[bytes]) -> bool:
    try:
        head = compression.decompressed(path, file).read(HEAD_BYTES)
    except DATA_ERRORS as error:
        corrupt(path, error)
        return True  # whoever reads it finds the damage again
    finally:
        file.seek(0)
    return _lines_begin(head)


def _lines_begin(head: bytes) -> bool:
    first, _, rest = head.removeprefix(BOM).lstrip().partition(b"\n")
    first = first.rstrip()
    if first.startswith(b"["):
        return bool(rest.strip()) and _is_value(first)
    broken = first.startswith(b"{") and first.endswith((b"{", b"[", b","))  # goes on in the next line
    return not (broken and rest[:1] in (b" ", b"\t", b"\n", b"\r", b'"', b"}"))


def _is_value(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True


def read_json_documents(part: Slice, file: IO[bytes], settings: ReaderSettings) -> Iterator[Record]:
    scan = _Scan(settings.max_document_bytes)
    try:
        stream = compression.decompressed(part.path, file)
        while chunk := stream.read(compression.READ_BYTES):
            for offset, element, size in scan.elements(chunk):
                location = f"{part.path}@{offset}"
                if size > settings.max_document_bytes:
                    yield Record(location, reason="too_large", excerpt=element[:EXCERPT_BYTES])
                elif record := from_json(element, location, settings):
                    yield record
    except DATA_ERRORS as error:
        yield corrupt(f"{part.path}@{scan.start}", error)
        return
    if left := scan.left():
        yield Record(f"{part.path}@{scan.start}", reason="corrupt_file", excerpt=left)


class _Scan:
    """Where elements begin and end: those of an array, or top-level values one after the other."""

    def __init__(self, limit: int) -> None:
        self.start = 0  # offset of the element at hand
        self._limit = limit
        self._offset = 0  # of the next chunk
        self._depth = 0
        self._base = 0  # depth of what lies between elements: 1 in an array
        self._in_string = False
        self._carry = b""  # a backslash that the next chunk belongs to
        self._pieces: list[bytes] = []  # of the element at hand; of one over the limit its beginning
        self._size = 0

    def elements(self, chunk: bytes) -> Iterator[tuple[int, bytes, int]]:
        """(offset, bytes, size) of elements that end in the chunk; of one over the limit the first bytes."""
        if not self._offset and chunk.startswith(BOM):
            chunk = b"   " + chunk[3:]
        start = self._offset - len(self._carry)
        chunk, self._carry = self._carry + chunk, b""
        # without escaped backslashes and quotes, each quote that is left begins or ends a string
        plain = chunk.replace(b"\\\\", b"  ")
        if plain.endswith(b"\\"):  # what it escapes is in the next chunk
            chunk, plain, self._carry = chunk[:-1], plain[:-1], b"\\"
        plain = plain.replace(b'\\"', b"  ")
        self._offset = start + len(chunk) + len(self._carry)
        position = begin = 0
        if not self._size and not self._in_string:
            self.start = start
        while position < len(chunk):
            if self._in_string:
                position = plain.find(b'"', position) + 1
                if not position:
                    break
                self._in_string = False
                continue
            between = self._depth == self._base
            found = (_STRUCTURE_OR_COMMA if between and self._base else _STRUCTURE).search(plain, position)
            if found is None:
                break
            position = found.end()
            character = plain[position - 1]
            if character == _QUOTE:
                self._in_string = True
            elif character == _COMMA:
                yield self._element(chunk[begin : position - 1])
                begin, self.start = position, start + position
            elif character in _OPEN:
                if not self._depth and character == _OPEN[0] and not self._base:
                    self._base, begin = 1, position
                    self.start, self._pieces, self._size = start + position, [], 0
                self._depth += 1
            elif self._depth:
                self._depth -= 1
                if self._depth < self._base:  # the array's end
                    yield self._element(chunk[begin : position - 1])
                    self._base = 0
                    begin, self.start = position, start + position
                elif not self._base and not self._depth:
                    yield self._element(chunk[begin:position])
                    begin, self.start = position, start + position
        self._keep(chunk[begin:])

    def left(self) -> bytes:
        """What is there after the last whole element, if it is more than white space, or the array has not ended."""
        rest = b"".join(self._pieces) + self._carry
        if rest.strip() or self._depth:
            return b"the file ends within: " + rest.strip()[:EXCERPT_BYTES]
        return b""

    def _element(self, last: bytes) -> tuple[int, bytes, int]:
        self._keep(last)
        pieces, size = self._pieces, self._size
        self._pieces, self._size = [], 0
        whole = b"".join(pieces)
        blank = len(whole) - len(whole.lstrip())
        return self.start + blank, whole, size

    def _keep(self, piece: bytes) -> None:
        if not piece:
            return
        self._size += len(piece)
        if self._size <= self._limit:
            self._pieces.append(piece)
        else:
            self._pieces = [b"".join([*self._pieces, piece[:EXCERPT_BYTES]])[:EXCERPT_BYTES]]
