"""A look into a source before it is prepared: the first records of its first files, read as prepare reads them.

Costs up to `DOCUMENTS` records of `FILES` files (of texts, as many files), whatever the corpus. A text_field or id_field that none of a
file's first records has is refused with the fields that are there; hours of tokenizing would otherwise end in quarantine.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.filters import rejected_by
from data_prep.formats import format_of
from data_prep.listing import Listing
from data_prep.plan import Slice
from data_prep.readers import ReaderSettings, Record, read_slice
from data_prep.readers.compression import decompressed
from data_prep.readers.warc import FACTS
from data_prep.rules.apply import apply
from data_prep.rules.check import check_rules
from data_prep.tokenize_unit import open_input
from pipeline.config.load import ConfigError
from pipeline.config.schema import RunConfig, SourceConfig

DOCUMENTS = 100
FILES = 4
JUDGED = 10_000  # files, by their names
HEAD_BYTES = 1 << 20
SHOWN = 30  # fields in a message
_BETWEEN = re.compile(r"[\s,\]]*")  # values of lines or of an array


@dataclass
class Look:
    """What was seen of one source."""

    source: str
    files: int  # of the source
    bytes: int
    formats: Counter[str]  # of the first files
    kept: list[Record] = field(default_factory=list)
    filtered: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)

    @property
    def seen(self) -> int:
        return len(self.kept) + self.filtered.total() + self.quarantined.total()

    def lines(self) -> Iterator[str]:
        """For people; the first one names the source."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.formats.most_common())
        if self.files > self.formats.total():
            kinds = f"of the first {self.formats.total():,}: {kinds}"
        yield f"source {self.source}: {self.files:,} files ({kinds}), {self.bytes:,} bytes"
        shares = [f"{len(self.kept)} kept"]
        for verb, counts in (("filtered", self.filtered), ("quarantined", self.quarantined)):
            shares += [f"{count} {verb} ({reason})" for reason, count in counts.most_common()]
        yield f"  of the first {self.seen} records {', '.join(shares)}"


def look(source: SourceConfig, index: int, files: Listing, config: RunConfig) -> Look:
    """Raises ConfigError for fields that are not there, and where nothing that was looked at can be used."""
    formats = Counter(format_of(file.path, source.format) or "unknown" for file in itertools.islice(files, JUDGED))
    found = Look(source.name, len(files), files.bytes, formats)
    reader = ReaderSettings.of(source, config.corpus.max_document_bytes)
    some = list(itertools.islice((file for file in files if file.bytes), DOCUMENTS))
    some = some[: FILES if format_of(some[0].path, source.format) != "text" else DOCUMENTS]
    for place, file in enumerate(some):
        with open_input(files.root, file.path, config.storage) as handle:
            _refuse_unknown_fields(source, index, file.path, handle)
            handle.seek(0)
            share = max(1, (DOCUMENTS - found.seen) // (len(some) - place))
            for record in itertools.islice(
                read_slice(Slice(file.path, file.bytes, file.identity), handle, reader), share
            ):
                if record.reason:
                    found.quarantined[record.reason] += 1
                elif rejection := record.rejected or rejected_by(
                    record.text, source.filters, conversation=source.conversations
                ):
                    found.filtered[rejection] += 1
                else:
                    found.kept.append(record)
    if source.rules.any:
        check_rules(config.corpus)
        rules = source.rules.model_copy(
            update={"classifier": None}
        )  # it may want a GPU, or packages of another machine
        outcomes = apply([record.text.decode() for record in found.kept], rules)
        found.filtered.update(outcome.rejected for outcome in outcomes if outcome.rejected)
        found.kept = [record for record, outcome in zip(found.kept, outcomes) if not outcome.rejected]
    if found.quarantined.total() == found.seen and found.seen:
        reasons = ", ".join(f"{reason} {count}" for reason, count in found.quarantined.most_common())
        raise ConfigError(
            f"corpus.sources[{index}]: none of the first {found.seen} records of {source.name} can be used ({reasons}, first of all in "
            f"{some[0].path}); look at its format and text_field ({source.format}, {source.text_field!r})"
        )
    return found


def fields_of(path: str, file: IO[bytes], kind: str | None) -> list[str] | None:
    """The fields of a file's first records, nested ones with dots; None where there are none to speak of."""
    try:
        if kind == "parquet":
            return list(_columns(pq.ParquetFile(file).schema_arrow))
        if kind == "arrow":
            return None
        if kind in ("json", "jsonl", "csv", "tsv"):
            head = decompressed(path, file).read(HEAD_BYTES).decode("utf-8-sig", errors="replace").lstrip()
            return _keys(head) if kind in ("json", "jsonl") else _header(head, "," if kind == "csv" else "\t")
    except (OSError, ValueError, pa.ArrowException):
        pass  # the reader says what is wrong with it
    return None


def _refuse_unknown_fields(source: SourceConfig, index: int, path: str, file: IO[bytes]) -> None:
    kind = format_of(path, source.format)
    usual = SourceConfig.model_fields["text_field"].default
    named = {"text_field": source.text_field, "id_field": source.id_field}
    if kind == "text":
        named["filters.where"] = source.filters.where[0] if source.filters.where else None
        for key, wanted in named.items():
            if wanted is not None and (key, wanted) != ("text_field", usual):
                raise ConfigError(
                    f"corpus.sources[{index}].{key}: {path} is text, a document without fields such as {wanted!r} asks for; leave it out"
                )
        return
    if kind == "warc":
        if source.text_field != usual:
            raise ConfigError(
                f"corpus.sources[{index}].text_field: of {path}, which is WARC, the text is that of each page; leave it out"
            )
        del named["text_field"]
    fields = list(FACTS) if kind == "warc" else fields_of(path, file, kind)
    if fields is None:
        return
    for key, wanted in named.items():
        if wanted is not None and wanted not in fields:
            shown = ", ".join(fields[:SHOWN]) + (", ..." if len(fields) > SHOWN else "")
            raise ConfigError(f"corpus.sources[{index}].{key}: there is no field {wanted!r} in {path}; it has {shown}")


def _columns(fields: Iterable[pa.Field], before: str = "") -> Iterator[str]:
    for each in fields:
        yield before + each.name
        if pa.types.is_struct(each.type):
            yield from _columns(each.type, f"{before}{each.name}.")


def _keys(head: str) -> list[str] | None:
    """Of up to DOCUMENTS objects together: any one of them may be broken, or lack what the others have."""
    found, decoder, objects = dict[str, None](), json.JSONDecoder(), 0
    at = _BETWEEN.match(head, head.startswith("[")).end()  # type: ignore[union-attr]  # matches nothing, too
    while at < len(head) and objects < DOCUMENTS:
        try:
            value, at = decoder.raw_decode(head, at)
        except (ValueError, RecursionError):
            value, at = None, head.find("\n{", at) + 1 or len(head)  # never into an object that goes on behind the head
        if isinstance(value, dict):
            found.update(dict.fromkeys(_dotted(value)))
            objects += 1
        at = _BETWEEN.match(head, at).end()  # type: ignore[union-attr]
    return list(found) or None


def _dotted(value: dict[str, Any], before: str = "") -> Iterator[str]:
    for key, inner in value.items():
        yield before + key
        if isinstance(inner, dict):
            yield from _dotted(inner, f"{before}{key}.")


def _header(head: str, delimiter: str) -> list[str] | None:
    return next(csv.reader(head.splitlines(), delimiter=delimiter), None)
