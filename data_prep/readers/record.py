"""What every reader yields, and what every reader asks of it."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson
import pyarrow as pa

from pipeline.config.conditions import Condition, parse
from pipeline.config.schema import SourceConfig
from pipeline.tokenizer.chat import conversation_of

EXCERPT_BYTES = 200
DATA_ERRORS = (
    OSError,
    EOFError,
    lzma.LZMAError,
    pa.ArrowInvalid,
    pa.ArrowNotImplementedError,
)  # of reading; what the storage raises is among them: `corrupt` tells


@dataclass(slots=True)
class Record:
    location: str
    text: bytes = b""
    doc_id: str = ""
    reason: str = ""  # not empty: quarantined
    excerpt: bytes = b""  # the first bytes of a quarantined record
    rejected: str = ""  # not empty: the condition on other fields that the document does not meet


@dataclass(frozen=True)
class ReaderSettings:
    format: str
    text_field: str  # a name, or the path of a nested field: meta.text
    id_field: str | None
    max_document_bytes: int
    where: tuple[Condition, ...] = ()
    conversations: bool = False  # the text is a list of messages; a record's is that as JSON

    @classmethod
    def of(cls, source: SourceConfig, max_document_bytes: int) -> ReaderSettings:
        where = tuple(map(parse, source.filters.where))
        return cls(source.format, source.text_field, source.id_field, max_document_bytes, where, source.conversations)


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"


MISSING = _Missing()  # not the same as null


def field(value: dict[str, Any], name: str) -> Any:
    """The field of that very name, or else the nested one that the dots lead to; MISSING if there is none."""
    found = value.get(name, MISSING)
    if found is MISSING and "." in name:
        found = value
        for part in name.split("."):
            found = found.get(part, MISSING) if isinstance(found, dict) else MISSING
    return found


def checked(record: Record) -> Record:
    """Quarantine what is empty or not UTF-8."""
    if not record.text:
        record.reason = "empty_document"
    elif not record.text.isascii():
        try:
            record.text.decode()
        except UnicodeDecodeError:
            record.reason, record.excerpt, record.text = "invalid_utf8", record.text[:EXCERPT_BYTES], b""
    return record


def judged(record: Record, where: Iterable[Condition], values: Iterable[Any]) -> Record:
    """Reject a document that does not meet a condition; quarantine one whose field is not there or holds something else."""
    if record.reason or record.rejected:
        return record
    for condition, value in zip(where, values):
        try:
            if value is MISSING:
                record.reason, record.excerpt = "missing_filter_field", f"no {condition.field}".encode()
            elif not condition.holds(value):
                record.rejected = condition.name
            else:
                continue
        except TypeError as error:
            record.reason, record.excerpt = "filter_type_mismatch", str(error).encode()
        record.excerpt = record.excerpt[:EXCERPT_BYTES]
        break
    return record


def corrupt(location: str, error: Exception) -> Record:
    """The rest of what was being read is damaged. Raises the error itself where it is the storage's."""
    if not is_in_the_data(error):
        raise error
    message = f"{type(error).__name__}: {error}"
    return Record(location, reason="corrupt_file", excerpt=message.encode(errors="backslashreplace")[:EXCERPT_BYTES])


def is_in_the_data(error: Exception) -> bool:
    """Arrow raises ArrowInvalid or a bare OSError for damaged bytes. With an errno, or a subclass, the storage failed."""
    return not isinstance(error, OSError) or (type(error) is OSError and error.errno is None)


def from_json(line: bytes | memoryview, location: str, settings: ReaderSettings) -> Record | None:
    """The document that a JSON object holds; None where there is only white space."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        line = bytes(line)
        if line.startswith(b"\xef\xbb\xbf"):  # a byte order mark, as Windows' programs begin files with
            return from_json(line[3:], location, settings)
        if not line or line.isspace():
            return None
        return Record(location, reason=_why_unparsable(line), excerpt=line[:EXCERPT_BYTES])
    text = field(value, settings.text_field) if isinstance(value, dict) else MISSING
    conversation, why = conversation_of(text) if settings.conversations and isinstance(text, list) else (b"", "")
    if why == "not_messages":
        return Record(location, reason=why, excerpt=bytes(line[:EXCERPT_BYTES]))
    if not conversation and (settings.conversations or not isinstance(text, str) or not text):
        reason = "not_messages" if settings.conversations and isinstance(text, str) else _why_no_text(text)
        return Record(location, reason=reason, excerpt=bytes(line[:EXCERPT_BYTES]))
    doc_id = location
    if settings.id_field:
        given = field(value, settings.id_field)
        if isinstance(given, float | dict | list):
            # orjson makes floats of integers over 64 bits, and different ids would become one: take what is written
            given = field(json.loads(bytes(line), parse_int=_Literal, parse_float=_Literal), settings.id_field)
        if given is not None and given is not MISSING:
            doc_id = str(given) if type(given) in (str, int) else _json_text(given)
    record = Record(location, conversation or str(text).encode(), doc_id, rejected=why)
    if settings.where:
        return judged(record, settings.where, (field(value, condition.field) for condition in settings.where))
    return record


def _why_no_text(value: Any) -> str:
    if value is MISSING:
        return "missing_field"
    if value is None:
        return "null_field"
    return "empty_document" if isinstance(value, str) else "non_string_field"


class _Literal(str):
    """A number as it is written."""


def _json_text(value: Any) -> str:
    """Compact JSON, numbers as they are written."""
    if isinstance(value, _Literal):
        return value
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{_json_text(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_json_text, value)) + "]"
    return json.dumps(value)


def _why_unparsable(line: bytes) -> str:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError:
        return "invalid_utf8"
    except (ValueError, RecursionError):
        return "invalid_json"
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "lone_surrogates"
    return "invalid_json"  # Python reads what JSON forbids (NaN, Infinity)
