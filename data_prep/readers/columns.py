"""Arrow columns to records.

A type is text if Arrow itself casts it to binary: strings and binaries of every layout (large, view, fixed size), in a
dictionary or run-end encoded, also where an extension type (JSON, say) is stored so. Numbers, lists and structs are not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.readers.record import EXCERPT_BYTES, MISSING, ReaderSettings, Record, checked, judged


def wanted_columns(schema: pa.Schema, settings: ReaderSettings) -> list[str]:
    """Of the fields that the settings name, those that are there: columns, or fields of structs by their path."""
    names = [settings.text_field, settings.id_field, *(condition.field for condition in settings.where)]
    return [name for name in dict.fromkeys(names) if name and _type_at(schema, name) is not None]


def records(
    path: str, first_row: int, batch: pa.RecordBatch, schema: pa.Schema, settings: ReaderSettings
) -> Iterator[Record]:
    """A record per row. `schema` is the whole file's, for the excerpts; the batch may hold only `wanted_columns`."""
    locations = [f"{path}#{first_row + row}" for row in range(batch.num_rows)]
    texts = _column(batch, settings.text_field)
    if texts is None:
        excerpt = f"the columns are {', '.join(schema.names)}".encode()[:EXCERPT_BYTES]
        for location in locations:
            yield Record(location, reason="missing_field", excerpt=excerpt)
        return
    ids: Sequence[str | None] = [None] * batch.num_rows
    if settings.id_field and (given := _column(batch, settings.id_field)) is not None:
        ids = _id_texts(given)
    values = _bytes_of(texts)
    conditions = [_values(batch, condition.field) for condition in settings.where]
    for row, (location, doc_id) in enumerate(zip(locations, ids)):
        text = values[row] if values is not None else None
        if text:
            if len(text) > settings.max_document_bytes:
                yield Record(location, reason="too_large", excerpt=text[:EXCERPT_BYTES])
            else:
                record = checked(Record(location, text, location if doc_id is None else doc_id))
                yield judged(record, settings.where, (column[row] for column in conditions)) if conditions else record
            continue
        if text is not None:
            reason, held = "empty_document", "is empty"
        elif not texts[row].is_valid:
            reason, held = "null_field", "is null"
        else:
            reason, held = "non_string_field", f"is {texts.type}: {texts[row]}"
        named = "" if doc_id is None else f" (id {doc_id})"
        yield Record(location, reason=reason, excerpt=f"{settings.text_field} {held}{named}".encode()[:EXCERPT_BYTES])


def _type_at(schema: pa.Schema, name: str) -> pa.DataType | None:
    if schema.names.count(name):
        return schema.field(schema.names.index(name)).type
    first, *rest = name.split(".")
    kind = schema.field(schema.names.index(first)).type if rest and first in schema.names else None
    for part in rest:
        index = kind.get_field_index(part) if isinstance(kind, pa.StructType) else -1
        kind = kind.field(index).type if index >= 0 else None  # type: ignore[union-attr]
    return kind


def _column(batch: pa.RecordBatch, name: str) -> pa.Array | None:
    """The column of that very name (the first of several), or else the nested field that the dots lead to."""
    if name in batch.schema.names:
        return batch.column(batch.schema.names.index(name))
    first, *rest = name.split(".")
    if not rest or first not in batch.schema.names:
        return None
    column = batch.column(batch.schema.names.index(first))
    for part in rest:
        if not isinstance(column.type, pa.StructType) or column.type.get_field_index(part) < 0:
            return None
        column = pc.struct_field(column, [part])  # null where the struct is
    return column


def _plain(column: pa.Array) -> pa.Array:
    """Without extension type, dictionary and run-end encoding."""
    while True:
        if isinstance(column, pa.ExtensionArray):
            column = column.storage
        elif isinstance(column.type, pa.DictionaryType):
            values = _without_views(column.dictionary)
            column = pa.DictionaryArray.from_arrays(column.indices, values).dictionary_decode()
        elif isinstance(column.type, pa.RunEndEncodedType):
            runs = pa.RunEndEncodedArray.from_arrays(column.run_ends, _without_views(column.values))
            column = pc.run_end_decode(runs).slice(column.offset, len(column))
        else:
            return column


def _without_views(values: pa.Array) -> pa.Array:
    """Arrow decodes no dictionary and no runs of views."""
    views = (pa.string_view(), pa.binary_view())
    return values.cast(pa.large_binary()) if values.type in views else values


def _bytes_of(column: pa.Array) -> list[bytes | None] | None:
    """None for a type that is no text."""
    try:
        return _plain(column).cast(pa.large_binary()).to_pylist()  # type: ignore[no-any-return]
    except pa.ArrowNotImplementedError:
        return None


def _values(batch: pa.RecordBatch, name: str) -> list[Any]:
    """What conditions compare: texts, numbers, true and false, and dates as text."""
    column = _column(batch, name)
    if column is None:
        return [MISSING] * batch.num_rows
    plain = _plain(column)
    if pa.types.is_temporal(plain.type) and not pa.types.is_interval(plain.type):
        plain = plain.cast(pa.string())
    values = _bytes_of(plain)
    if values is None:
        return plain.to_pylist()  # type: ignore[no-any-return]
    return [None if value is None else value.decode(errors="backslashreplace") for value in values]


def _id_texts(column: pa.Array) -> list[str | None]:
    """Ids as text: what is text itself, numbers and dates as Arrow writes them, other bytes in hexadecimal, JSON of what is nested."""
    plain = _plain(column)
    if pa.types.is_fixed_size_binary(plain.type):
        return [None if value is None else value.hex() for value in plain.to_pylist()]
    values = _bytes_of(plain)
    if values is not None:
        return [None if value is None else value.decode(errors="backslashreplace") for value in values]
    try:
        return plain.cast(pa.string()).to_pylist()  # type: ignore[no-any-return]
    except pa.ArrowNotImplementedError:
        return [None if value is None else json.dumps(value, default=str) for value in plain.to_pylist()]
