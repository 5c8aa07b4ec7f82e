"""Units of work: slices of input files of about `corpus.unit_bytes`, 2-5 minutes of one core each.

`plan_source` is a pure function of the listing. A file over one and a half units is cut (plain JSON lines by byte range,
Parquet by row group); smaller files are gathered in path order until a unit is full. A unit's identity is a digest of its
slices and the settings that decide its bytes, and does not depend on other units.

Growth: units of earlier plans whose files are all still there are kept as they are, in their order, and only the rest is
planned anew. So adding files to a source re-does nothing, and the new units have the next `generation`: of two equal
documents the one in the older generation stays, and a full held-out set is not disturbed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from data_prep import warc_versions
from data_prep.contamination import CONTAMINATION_VERSION
from data_prep.filters import judges_text
from data_prep.formats import format_of, is_compressed
from data_prep.listing import InputFile, Listing
from data_prep.near import SIGNATURES_VERSION
from data_prep.paragraphs import PARAGRAPHS_VERSION
from data_prep.rules import RULES_VERSION
from pipeline.config.schema import CorpusConfig, SourceConfig
from pipeline.manifest import canonical_json

FORMAT_VERSION = 3  # raise when the same inputs would give other bytes


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
    if source.conversations:
        settings["conversations"] = True
        settings |= {"filters_judge": "what is said"} if judges_text(source.filters) else {}
    if source.format == "text" and source.filters.where:
        settings["where"] = "no text meets it"
    if source.format == "warc":
        settings["warc"] = warc_versions.versions()
    if source.rules.any:
        rules = source.rules.model_dump(mode="json", exclude_none=True)
        settings["rules"] = {"version": RULES_VERSION, **rules}
    if corpus.near_duplicates is not None and not source.conversations:
        near = corpus.near_duplicates.model_dump(mode="json")
        settings["near_duplicates"] = {"version": SIGNATURES_VERSION, **near}
    if corpus.duplicate_paragraphs is not None and not source.conversations:
        parts = corpus.duplicate_paragraphs.model_dump(mode="json")
        settings["duplicate_paragraphs"] = {"version": PARAGRAPHS_VERSION, **parts}
    if corpus.decontamination is not None:
        found = corpus.decontamination.model_dump(mode="json", exclude={"tasks"}, exclude_none=True)
        settings["decontamination"] = {"version": CONTAMINATION_VERSION, "questions": None, **found}
    return settings | {"keep_rejected": True} if corpus.keep_rejected else settings


def unit_id(slices: Sequence[Slice], settings: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(settings) + orjson.dumps(slices)).hexdigest()[:32]


def plan_source(
    source: SourceConfig,
    files: Iterable[InputFile],
    unit_bytes: int,
    settings: dict[str, Any],
    known: Sequence[Unit] = (),
    row_group_bytes: Callable[[str], list[int] | None] = lambda _path: None,
    is_json_lines: Callable[[str], bool] = lambda _path: True,
) -> Iterator[Unit]:
    """All units of a source: `known` ones that still hold, in their order, then new ones in path order.

    `known`: units of earlier plans of this storage. `row_group_bytes(path)`: compressed sizes of a Parquet file's row
    groups, None if its footer cannot be read (it is then one slice, and the reader quarantines it). `is_json_lines(path)`:
    whether a JSON file holds a document a line, by its first bytes. Both are asked of large files alone.

    Memory beside the listing: 25 bytes a file where units are known, one byte else.
    """
    files = files if isinstance(files, Listing) else sorted(files)
    used = np.zeros(len(files), bool)
    generation = 0
    for unit in _still_hold(known, source.name, settings, files, used):
        generation = max(generation, unit.generation + 1)
        yield unit
    waiting, waiting_size = list[Slice](), 0

    def close() -> Unit:
        return Unit(unit_id(waiting, settings), source.name, tuple(waiting), generation)

    for file in compress(files, ~used):
        for part in _cut(file, format_of(file.path, source.format), unit_bytes, row_group_bytes, is_json_lines):
            if waiting_size and waiting_size + part.size > unit_bytes:
                yield close()
                waiting, waiting_size = [], 0
            waiting.append(part)
            waiting_size += part.size
    if waiting:
        yield close()


def _still_hold(
    known: Sequence[Unit], source: str, settings: dict[str, Any], files: Sequence[InputFile], used: NDArray[np.bool_]
) -> Iterator[Unit]:
    """Known units of these settings whose files are all still there and in no other of them; their files become `used`.

    Units that share a cut file are kept or dropped together.
    """
    if not len(known):
        return
    places = _Places(files)
    group_of = {unit.id: group for group in _sharing(unit for unit in known if _is_cut(unit)) for unit in group}
    decided: dict[str, bool] = {}
    for unit in known:
        if unit.id not in decided:
            group = group_of.get(unit.id, [unit])
            at = places.of(key for member in group for key in member.files)
            same = all(member.source == source and member.id == unit_id(member.slices, settings) for member in group)
            keep = same and at is not None and not used[at].any()
            if keep:
                used[at] = True
            decided.update((member.id, keep) for member in group)
        if decided[unit.id]:
            yield unit


class _Places:
    """Where in a listing a file lies, by 128-bit hashes: 20 bytes a file."""

    def __init__(self, files: Sequence[InputFile]) -> None:
        hashes = bytearray()
        for file in files:
            hashes += _hash((file.path, file.identity))
        high, low = np.frombuffer(hashes, "<u8").reshape(-1, 2).T
        self._order = np.argsort(high).astype(np.int32)
        self._high, self._low = high[self._order], low[self._order]

    def of(self, keys: Iterable[tuple[str, str]]) -> NDArray[np.int32] | None:
        """Of (path, identity) of every file; None if one is not there."""
        high, low = np.frombuffer(b"".join(map(_hash, dict.fromkeys(keys))), "<u8").reshape(-1, 2).T
        at = np.searchsorted(self._high, high)
        if (at == len(self._order)).any() or (self._high[at] != high).any() or (self._low[at] != low).any():
            return None
        return self._order[at]


def _hash(key: tuple[str, str]) -> bytes:
    return xxhash.xxh3_128_digest(f"{key[0]}\0{key[1]}".encode())


def _is_cut(unit: Unit) -> bool:
    return any(part.stop is not None for part in unit.slices)


def _sharing(units: Iterable[Unit]) -> list[list[Unit]]:
    """Groups of units that share a file, directly or through others."""
    groups: list[list[Unit]] = []
    owner: dict[tuple[str, str], list[Unit]] = {}
    for unit in units:
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
