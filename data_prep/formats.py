"""What a file is: by its name where a whole listing has to be judged, by its first bytes where it is opened.

A name says kind and compression (`a.jsonl.zst`). Names that say neither are no documents: next to data lie `_SUCCESS`,
`README.html`, checksums and logs. They are taken only where `format` says what they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ENDINGS = {
    "json": (".jsonl", ".ndjson", ".jsonlines", ".json"),  # lines, an array or whole values: their first bytes tell
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow", ".feather", ".ipc"),
    "csv": (".csv",),
    "tsv": (".tsv", ".tab"),
    "text": (".txt", ".text", ".md", ".markdown", ".rst"),
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz", ".lz4": "lz4"}
MAGIC = {
    "gzip": (b"\x1f\x8b\x08",),
    "zstd": (b"\x28\xb5\x2f\xfd",),
    "bz2": tuple(b"BZh%d1AY&SY" % level for level in range(1, 10)),
    "xz": (b"\xfd7zXZ\x00",),
    "lz4": (b"\x04\x22\x4d\x18",),
}
MAGIC_BYTES = 10
SEEKING = frozenset({"parquet", "arrow"})  # read from several places: compressed inside, not as a whole
ROWS = frozenset({"json", "jsonl", "csv", "tsv"})  # many documents a file, none shorter than a few bytes
SHOWN = 5  # names in a message
UNKNOWN, TEXT, DATA = range(3)


@dataclass(frozen=True)
class LeftOut:
    """Files that `auto` does not take: how many, and the first of them by name."""

    unknown: int = 0
    text_beside_data: int = 0
    examples: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return self.unknown + self.text_beside_data

    def __str__(self) -> str:
        parts = [
            f"{self.unknown:,} of no format known by name" if self.unknown else "",
            f"{self.text_beside_data:,} text files beside data files" if self.text_beside_data else "",
        ]
        names = ", ".join(self.examples) + (", ..." if self.count > len(self.examples) else "")
        return f"{self.count:,} files left out ({', '.join(filter(None, parts))}): {names}"


def format_of(path: str, configured: str) -> str | None:
    """json, parquet, arrow, csv, tsv or text (or jsonl, if configured); None where "auto" finds a name that says nothing."""
    if configured != "auto":
        return configured
    name = path.lower()
    compression = compression_by_name(name)
    if compression is not None:
        name = name[: name.rindex(".")]
    for kind, endings in ENDINGS.items():
        if name.endswith(endings):
            return None if compression is not None and kind in SEEKING else kind
    return None


def compression_by_name(path: str) -> str | None:
    return next((codec for ending, codec in COMPRESSIONS.items() if path.lower().endswith(ending)), None)


def compression_of(path: str, head: bytes) -> str | None:
    """By the file's first bytes; a name that promises a compression holds where they tell nothing (and reading fails)."""
    for codec, starts in MAGIC.items():
        if head.startswith(starts):
            return codec
    return compression_by_name(path)


def is_compressed(path: str) -> bool:
    return compression_by_name(path) is not None


@lru_cache(maxsize=1024)
def _kind_of_ending(ending: str) -> str | None:
    return format_of(f".{ending}", "auto")


def documents_among(paths: Iterable[str], configured: str) -> tuple[NDArray[np.bool_], LeftOut]:
    """Which files of a source hold documents, and what was left out. A byte a path is kept.

    With "auto": names that say what they are, outside folders and files that data engines keep for themselves (`_delta_log/`,
    `_metadata`); text files only where there are no data files, for beside these they are descriptions (README.md).
    """
    roles = bytearray()
    first: dict[int, list[str]] = {UNKNOWN: [], TEXT: []}  # the smallest names of each
    for path in paths:
        kind = _kind_of_ending(
            path[path.rfind("/") + 1 :].partition(".")[2]
        )  # of a name, all that follows its first dot
        role = UNKNOWN if kind is None else TEXT if kind == "text" else DATA
        if configured != "auto":
            role = DATA
        elif role == DATA and (path.startswith("_") or "/_" in path):
            role = UNKNOWN
        roles.append(role)
        if role != DATA and (len(first[role]) < SHOWN or path < first[role][-1]):
            first[role] = sorted([*first[role], path])[:SHOWN]
    found = np.frombuffer(bytes(roles), np.uint8)
    chosen = found == (DATA if DATA in roles else TEXT)
    unknown = int((found == UNKNOWN).sum())
    beside = len(found) - unknown - int(chosen.sum())
    examples = tuple(sorted(first[UNKNOWN] + (first[TEXT] if beside else []))[:SHOWN])
    return chosen, LeftOut(unknown, beside, examples)
