"""Which files a source consists of, and what identifies each.

An input file is identified by its path relative to the source's root, its size and its content: the sha256 of a local
file, the etag of an S3 object. So the same files at another place are the same corpus. Local files over 256 MB are
sampled (64 evenly spaced MiB with first and last): listing must take seconds, not read terabytes.

A listing is made for a million files and more: it is walked in the order of its paths and held in Arrow columns, 150 bytes
a file where objects would need 600.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any, overload

import pyarrow as pa
import pyarrow.compute as pc
from botocore.exceptions import BotoCoreError

from data_prep import warc_versions
from data_prep.formats import LeftOut, documents_among, format_of
from pipeline.arrow import column
from pipeline.config.load import ConfigError, expand_path
from pipeline.config.schema import SourceConfig, StorageConfig
from pipeline.s3_listing import below
from pipeline.storage import filesystem

WHOLE_FILE_BYTES = 256 * 1024 * 1024
SAMPLES = 64
REMEDY = "To take them, say what they are (format: text, json, csv, ...); to leave them out unmentioned, exclude them"
MIB = 1 << 20
ROWS = 16_384  # that are Python objects at a time
SCHEMA = pa.schema([("path", pa.string()), ("bytes", pa.int64()), ("identity", pa.string())])
FOUND = pa.schema([("path", pa.string()), ("bytes", pa.int64()), ("etag", pa.string())])
Found = Iterable[tuple[str, int | None, str | None]]  # path, size and etag where they are known

log = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class InputFile:
    path: str  # relative to the source's root; "" never
    bytes: int
    identity: str  # "sha256:..." or "etag:..."


class Listing(Sequence[InputFile]):
    """The files of a source, in the order of their paths."""

    def __init__(self, root: str, files: Iterable[tuple[str, int, str]]) -> None:
        self.root = root  # absolute folder or s3:// prefix that paths are relative to
        self.table = _table(files, SCHEMA)

    @classmethod
    def of(cls, root: str, table: pa.Table) -> Listing:
        """From the table of another one."""
        listing = cls(root, ())
        listing.table = table
        return listing

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __iter__(self) -> Iterator[InputFile]:
        return (InputFile(*row) for row in _rows(self.table))

    @overload
    def __getitem__(self, index: int) -> InputFile: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[InputFile]: ...
    def __getitem__(self, index: int | slice) -> InputFile | Sequence[InputFile]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        path, size, identity = (self.table.column(name)[index].as_py() for name in SCHEMA.names)
        return InputFile(path, size, identity)

    @property
    def bytes(self) -> int:
        return int(pc.sum(self.table["bytes"]).as_py() or 0)

    @cached_property
    def digest(self) -> str:
        """sha256 over path, size and identity of every file, in the order of their paths."""
        digest = hashlib.sha256()
        between, end = column(["\n", "\0"], pa.string())  # NUL is in no path
        for batch in self.table.to_batches(ROWS):
            path, size, identity = batch.columns
            lines = pc.binary_join_element_wise(path, size.cast(pa.string()), identity, between, end)
            digest.update("".join(lines.to_pylist()).encode())
        return digest.hexdigest()


def _table(rows: Iterable[tuple[object, ...]], schema: pa.Schema) -> pa.Table:
    rows, batches = iter(rows), []
    while some := list(islice(rows, ROWS)):
        columns = [column(values, field.type) for values, field in zip(zip(*some), schema)]
        batches.append(pa.record_batch(columns, schema=schema))
    return pa.Table.from_batches(batches, schema)


def _rows(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    for batch in table.to_batches(ROWS):
        yield from zip(*(column.to_pylist() for column in batch.columns))


def list_source(source: SourceConfig, index: int, storage: StorageConfig) -> Listing:
    """The files of a source. Raises ConfigError naming `corpus.sources[index].path` if there are none.

    Files that hold no documents (`formats.documents_among`) are left out with a warning that counts and names them.
    """
    key = f"corpus.sources[{index}].path"
    if source.format == "warc" and not warc_versions.is_installed():
        raise ConfigError(f"corpus.sources[{index}].format: warc {warc_versions.NEEDS}")
    path = expand_path(source.path).rstrip("/")
    root = path
    found: Found
    single = False  # the path names one file: it has been chosen already
    if path.startswith("s3://"):
        single, found = _list_s3(path, storage, key, folder=source.path.endswith("/"))
    elif not os.path.exists(path):
        raise ConfigError(f"{key}: {path} does not exist; name a folder, a file or an s3:// prefix")
    elif os.path.isfile(path):
        single, found = True, [(os.path.basename(path), None, None)]
    else:
        found = _walk(path, "", _matcher(source.exclude))
    left_out = LeftOut()
    if single:
        root = path.rpartition("/")[0] or "/"
        if format_of(os.path.basename(path), source.format) is None:
            raise ConfigError(
                f"{key}: {path} has a name that says no format; set corpus.sources[{index}].format to what it is"
            )
    else:
        wanted, unwanted = _matcher(source.include), _matcher(source.exclude)
        found = (file for file in found if wanted(file[0]) and not unwanted(file[0]))
        if source.format == "auto":
            table = _table(found, FOUND)
            chosen, left_out = documents_among((path for path, _, _ in _rows(table)), source.format)
            found = _rows(table.filter(column(chosen.tolist(), pa.bool_())))
    if left_out.count:
        log.warning("source %s: %s. %s", source.name, left_out, REMEDY)
    files = Listing(root, (_identified(root, *file) for file in _within(root, found, source.max_bytes)))
    if not files and left_out.count:
        raise ConfigError(f"{key}: {path} holds no file to read, {left_out}. {REMEDY}")
    if not files:
        raise ConfigError(
            f"{key}: {path} holds no file that include {list(source.include)} takes and exclude {list(source.exclude)} leaves; "
            "the corpus would be empty"
        )
    if files.bytes == 0:
        raise ConfigError(f"{key}: all {len(files)} files below {path} are empty; the corpus would be empty")
    return files


def hash_order(path: str) -> bytes:
    """A sort key that spreads paths evenly and depends on nothing else."""
    return hashlib.sha256(path.encode(errors="surrogateescape")).digest()


def _within(root: str, found: Found, max_bytes: int | None) -> Found:
    """In hash order until `max_bytes` are reached, the first one always; returned in the order of paths."""
    if max_bytes is None:
        return found
    chosen: list[tuple[str, int | None, str | None]] = []
    total = 0
    for name, size, etag in sorted(found, key=lambda file: hash_order(file[0])):
        size = os.stat(os.path.join(root, name)).st_size if size is None else size
        if chosen and total + size > max_bytes:
            break
        chosen.append((name, size, etag))
        total += size
    return sorted(chosen, key=lambda file: file[0])


def _walk(root: str, folder: str, unwanted: Callable[[str], bool]) -> Iterator[tuple[str, None, None]]:
    """Files below a folder in the order of their paths, without hidden ones, and without looking into folders that are
    excluded whole."""
    for name in _names(root, folder, unwanted):
        path = f"{folder}{name}"
        if name.endswith("/"):
            yield from _walk(root, path, unwanted)
            continue
        if not path.isascii() and not _is_utf8(path):
            raise ConfigError(f"{root}/{path!a}: the file's name is not UTF-8; rename it, or exclude its folder")
        yield path, None, None


def _names(root: str, folder: str, unwanted: Callable[[str], bool]) -> list[str]:
    """What lies in one folder, as far as it is wanted; a folder in it with a slash, so that all sort as their paths do."""
    names = []
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_file():
                names.append(entry.name)
            elif entry.is_dir():
                up = os.path.realpath(os.path.join(root, folder))
                if entry.is_symlink() and up.startswith(os.path.realpath(entry.path)):
                    continue  # leads back up
                path = f"{folder}{entry.name}"
                if not all(
                    unwanted(path + "/\0" * depth) for depth in (1, 2, 3)
                ):  # only `**` takes any name at any depth
                    names.append(entry.name + "/")
    return sorted(names)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _list_s3(uri: str, storage: StorageConfig, key: str, folder: bool) -> tuple[bool, Found]:
    """Whether the URI names an object, and that or those below it. S3 answers in the order of UTF-8, as code points sort."""
    prefix = uri.removeprefix("s3://")
    name = prefix.partition("/")[2]
    try:
        pages = below(filesystem(uri, storage), prefix)
        first = next(pages, [])
        itself = [] if folder else [found for found in first if found.key == name]
        first = next(pages, []) if itself or (first and first[0].key == name) else first
    except FileNotFoundError:
        itself, first = [], []
    except (OSError, BotoCoreError) as error:
        raise ConfigError(f"{key}: cannot list {uri} ({type(error).__name__}: {error})") from error
    if itself and first:
        raise ConfigError(
            f"{key}: {uri} is an object, and there are others below it; write {uri}/ for those, or name the object's folder"
        )
    if itself:
        return True, [(name.rpartition("/")[2], itself[0].bytes, itself[0].etag)]
    if not first:
        raise ConfigError(f"{key}: there is no object at or below {uri}")
    start = len(name) + 1 if name else 0
    every = (found for page in chain([first], pages) for found in page if not found.key.endswith("/"))
    return False, ((path[start:], size, etag) for path, size, etag in every)


def _identified(root: str, name: str, size: int | None, etag: str | None) -> tuple[str, int, str]:
    if etag is not None:
        assert size is not None
        return name, size, f"etag:{etag}"
    file = os.open(os.path.join(root, name), os.O_RDONLY)  # a Python file costs three times as much
    try:
        size = os.fstat(file).st_size
        digest = hashlib.sha256()
        if size <= WHOLE_FILE_BYTES:
            left = size
            while left and (chunk := os.read(file, min(left, MIB))):
                digest.update(chunk)
                left -= len(chunk)
            return name, size - left, f"sha256:{digest.hexdigest()}"
        for sample in range(SAMPLES):
            digest.update(os.pread(file, MIB, (size - MIB) * sample // (SAMPLES - 1)))
        return name, size, f"sampled-sha256:{digest.hexdigest()}"
    finally:
        os.close(file)


def _matcher(globs: tuple[str, ...]) -> Callable[[str], bool]:
    if not globs:
        return lambda _path: False
    pattern = re.compile("|".join(f"(?:{_glob_pattern(glob)})" for glob in globs))
    return lambda path: pattern.fullmatch(path) is not None


def _glob_pattern(glob: str) -> str:
    """`**/` is any number of folders, `**` anything, `*` and `?` stay within a path segment, `[abc]` is a character class."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", glob)
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        wild.get(part) or (part.replace("[!", "[^") if part.startswith("[") and part.endswith("]") else re.escape(part))
        for part in parts
    )
