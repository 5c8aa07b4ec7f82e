"""Units of work: slices of input files of about `corpus.unit_bytes`, 2-5 minutes of one core each.

`plan_source` is a pure function of the listing. A file over one and a half units is cut (plain JSON lines by byte range,
Parquet by row group); smaller files are gathered in path order until a unit is full. A unit's identity is a digest of its
slices and the settings that decide its bytes, and does not depend on other units.

Growth: units of earlier plans whose files are all still there are kept as they are, in their order, and only the rest is
planned anew. So adding files to a source re-does nothing, and the new units have the next `generation`: of two equal
documents the one in the older generation stays, and a full held-out set is not disturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from data_prep.formats import format_of, is_compressed
from data_prep.listing import InputFile
from pipeline.config.schema import CorpusConfig, SourceConfig
from pipeline.manifest import digest_of

FORMAT_VERSION = 2  # raise when the same inputs would give other bytes


@dataclass(frozen=True)
class Slice:
    """Part of a file: bytes [start, stop) of plain JSON lines, row groups [start, stop) of Parquet, or all of it."""

    path: str
    bytes: int  # of the file
    identity: str
    start: int = 0
    stop: int | None = None  # None: to the end
    size: int = 0  # bytes of the slice


@dataclass(frozen=True)
class Unit:
    id: str
    source: str
    slices: tuple[Slice, ...]
    generation: int = 0

    @property
    def size(self) -> int:
        return sum(part.size for part in self.slices)

    @property
    def files(self) -> set[tuple[str, str]]:
        return {(part.path, part.identity) for part in self.slices}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Unit:
        slices = tuple(Slice(**part) for part in value["slices"])
        return cls(value["id"], value["source"], slices, value["generation"])


def unit_settings(source: SourceConfig, corpus: CorpusConfig, tokenizer_sha256: str) -> dict[str, Any]:
    """Everything but the input that decides what is written of a unit."""
    settings = {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer_sha256,
        "source": source.name,
        "format": source.format,
        "text_field": source.text_field,
        "id_field": source.id_field,
        "filters": source.filters.model_dump(mode="json", exclude={"drop_exact_duplicates"}),
        "heldout_fraction": corpus.heldout_fraction,
        "heldout_max_documents": corpus.heldout_max_documents,
        "max_document_bytes": corpus.max_document_bytes,
    }
    return settings | {"keep_rejected": True} if corpus.keep_rejected else settings


def unit_id(slices: Sequence[Slice], settings: dict[str, Any]) -> str:
    return digest_of({"slices": [asdict(part) for part in slices], "settings": settings})[:32]


def plan_source(
    source: SourceConfig,
    files: Iterable[InputFile],
    unit_bytes: int,
    settings: dict[str, Any],
    known: Sequence[Unit] = (),
    row_group_bytes: Callable[[str], list[int] | None] = lambda _path: None,
    is_json_lines: Callable[[str], bool] = lambda _path: True,
) -> list[Unit]:
    """All units of a source: `known` ones that still hold, in their order, then new ones in path order.

    `known`: units of earlier plans of this storage. `row_group_bytes(path)`: compressed sizes of a Parquet file's row
    groups, None if its footer cannot be read (it is then one slice, and the reader quarantines it). `is_json_lines(path)`:
    whether a JSON file holds a document a line, by its first bytes. Both are asked of large files alone.
    """
    listing = {(file.path, file.identity): file for file in files}
    kept: list[Unit] = []
    used: set[tuple[str, str]] = set()
    for group in _whole_files(known):
        taken = set().union(*(unit.files for unit in group))
        same = all(unit.source == source.name and unit.id == unit_id(unit.slices, settings) for unit in group)
        if same and taken <= listing.keys() and not taken & used:
            kept += group
            used |= taken
    generation = 1 + max((unit.generation for unit in kept), default=-1)
    units, waiting, waiting_size = list(kept), list[Slice](), 0

    def close() -> None:
        nonlocal waiting, waiting_size
        if waiting:
            units.append(Unit(unit_id(waiting, settings), source.name, tuple(waiting), generation))
        waiting, waiting_size = [], 0

    for key in sorted(listing.keys() - used):
        file = listing[key]
        for part in _cut(file, format_of(file.path, source.format), unit_bytes, row_group_bytes, is_json_lines):
            if waiting_size and waiting_size + part.size > unit_bytes:
                close()
            waiting.append(part)
            waiting_size += part.size
    close()
    return units


def _whole_files(known: Sequence[Unit]) -> list[list[Unit]]:
    """Units that share a file (its slices) are kept or dropped together."""
    groups: list[list[Unit]] = []
    owner: dict[tuple[str, str], list[Unit]] = {}
    for unit in known:
        shared = list({id(owner[key]): owner[key] for key in unit.files if key in owner}.values())
        group = shared[0] if shared else []
        if not shared:
            groups.append(group)
        for other in shared[1:]:
            group += other
            for member in other:
                owner.update(dict.fromkeys(member.files, group))
            other.clear()
        group.append(unit)
        owner.update(dict.fromkeys(unit.files, group))
    return [group for group in groups if group]


def _cut(
    file: InputFile,
    kind: str | None,
    unit_bytes: int,
    row_group_bytes: Callable[[str], list[int] | None],
    is_json_lines: Callable[[str], bool],
) -> list[Slice]:
    whole = Slice(file.path, file.bytes, file.identity, size=file.bytes)
    if file.bytes <= unit_bytes * 3 // 2 or kind not in ("parquet", "json", "jsonl"):
        return [whole]
    if kind != "parquet":
        if is_compressed(file.path) or not is_json_lines(file.path):
            return [whole]
        parts = -(-file.bytes // unit_bytes)
        edges = [file.bytes * part // parts for part in range(parts + 1)]
        return [replace(whole, start=start, stop=stop, size=stop - start) for start, stop in zip(edges, edges[1:])]
    sizes = row_group_bytes(file.path)
    if not sizes:
        return [whole]
    slices, start, size = [], 0, 0
    for group, group_bytes in enumerate(sizes):
        if size and size + group_bytes > unit_bytes:
            slices.append(replace(whole, start=start, stop=group, size=size))
            start, size = group, 0
        size += group_bytes
    slices.append(replace(whole, start=start, stop=len(sizes), size=size))
    return slices
