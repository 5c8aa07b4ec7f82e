"""Which files a source consists of, and what identifies each.

An input file is identified by its path relative to the source's root, its size and its content: the sha256 of a local
file, the etag of an S3 object. So the same files at another place are the same corpus. Local files over 256 MB are
sampled (64 evenly spaced MiB with first and last): listing must take seconds, not read terabytes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.formats import LeftOut, documents_among, format_of
from pipeline.config.load import ConfigError, expand_path
from pipeline.config.schema import SourceConfig, StorageConfig
from pipeline.storage import filesystem

WHOLE_FILE_BYTES = 256 * 1024 * 1024
SAMPLES = 64
REMEDY = "To take them, say what they are (format: text, json, csv, ...); to leave them out unmentioned, exclude them"
MIB = 1 << 20

log = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class InputFile:
    path: str  # relative to the source's root; "" never
    bytes: int
    identity: str  # "sha256:..." or "etag:..."


def source_root(source: SourceConfig) -> str:
    """Absolute folder or s3:// prefix that input paths are relative to. A source that is one file has its folder."""
    path = expand_path(source.path).rstrip("/")
    return path if "://" in path or not Path(path).is_file() else str(Path(path).parent)


def list_source(source: SourceConfig, index: int, storage: StorageConfig) -> list[InputFile]:
    """The files of a source, sorted by path. Raises ConfigError naming `corpus.sources[index].path` if there are none.

    Files that hold no documents (`formats.documents_among`) are left out with a warning that counts and names them.
    """
    key = f"corpus.sources[{index}].path"
    path = expand_path(source.path).rstrip("/")
    remote = path.startswith("s3://")
    if remote:
        found = _list_s3(path, storage, key)
    elif not os.path.exists(path):
        raise ConfigError(f"{key}: {path} does not exist; name a folder, a file or an s3:// prefix")
    elif os.path.isfile(path):
        found = {os.path.basename(path): (os.path.getsize(path), None)}
    else:
        found = dict(_walk(path, "", _matcher(source.exclude)))
    single = len(found) == 1 and (path.endswith("/" + next(iter(found))))
    if not single:
        wanted, unwanted = _matcher(source.include), _matcher(source.exclude)
        found = {name: info for name, info in found.items() if wanted(name) and not unwanted(name)}
    left_out = LeftOut()
    if single:
        documents = list(found)
        if format_of(documents[0], source.format) is None:
            raise ConfigError(
                f"{key}: {path} has a name that says no format; set corpus.sources[{index}].format to what it is"
            )
    else:
        documents, left_out = documents_among(found, source.format)
    if left_out.count:
        log.warning("source %s: %s. %s", source.name, left_out, REMEDY)
    chosen = _within({name: found[name] for name in documents}, source.max_bytes)
    files = [_identified(source_root(source), name, *found[name]) for name in sorted(chosen)]
    if not files and left_out.count:
        raise ConfigError(f"{key}: {path} holds no file to read, {left_out}. {REMEDY}")
    if not files:
        raise ConfigError(
            f"{key}: {path} holds no file that include {list(source.include)} takes and exclude {list(source.exclude)} leaves; "
            "the corpus would be empty"
        )
    if sum(file.bytes for file in files) == 0:
        raise ConfigError(f"{key}: all {len(files)} files below {path} are empty; the corpus would be empty")
    return files


def hash_order(path: str) -> bytes:
    """A sort key that spreads paths evenly and depends on nothing else."""
    return hashlib.sha256(path.encode(errors="surrogateescape")).digest()


def _within(found: dict[str, tuple[int, str | None]], max_bytes: int | None) -> list[str]:
    """Files in hash order until `max_bytes` are reached; the first file always counts."""
    if max_bytes is None:
        return list(found)
    chosen: list[str] = []
    total = 0
    for name in sorted(found, key=hash_order):
        if chosen and total + found[name][0] > max_bytes:
            break
        chosen.append(name)
        total += found[name][0]
    return chosen


def _walk(root: str, folder: str, unwanted: Callable[[str], bool]) -> Iterator[tuple[str, tuple[int, None]]]:
    """Files below a folder, without hidden ones, and without looking into folders that are excluded whole."""
    for entry in os.scandir(os.path.join(root, folder)):
        path = f"{folder}{entry.name}"
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if entry.is_symlink() and os.path.realpath(os.path.join(root, folder)).startswith(
                os.path.realpath(entry.path)
            ):
                continue  # leads back up
            if not all(unwanted(path + "/\0" * depth) for depth in (1, 2, 3)):  # only `**` takes any name at any depth
                yield from _walk(root, path + "/", unwanted)
        elif entry.is_file():
            if not path.isascii() and not _is_utf8(path):
                raise ConfigError(f"{root}/{path!a}: the file's name is not UTF-8; rename it, or exclude its folder")
            yield path, (entry.stat().st_size, None)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _list_s3(uri: str, storage: StorageConfig, key: str) -> dict[str, tuple[int, str | None]]:
    prefix = uri.removeprefix("s3://")
    try:
        found: dict[str, dict[str, Any]] = filesystem(uri, storage).find(prefix, detail=True)
        objects = {name: info for name, info in found.items() if info["type"] != "directory"}
    except FileNotFoundError:
        objects = {}
    except (PermissionError, OSError) as error:
        raise ConfigError(f"{key}: cannot list {uri} ({type(error).__name__}: {error})") from error
    if not objects:
        raise ConfigError(f"{key}: there is no object at or below {uri}")
    folder = prefix if prefix not in objects else prefix.rpartition("/")[0]
    return {
        name[len(folder) + 1 :]: (int(info["size"]), str(info["ETag"]).strip('"'))
        for name, info in objects.items()
        if not name.endswith("/")
    }


def _identified(root: str, name: str, size: int, etag: str | None) -> InputFile:
    if etag is not None:
        return InputFile(name, size, f"etag:{etag}")
    digest = hashlib.sha256()
    with open(os.path.join(root, name), "rb") as file:
        if size <= WHOLE_FILE_BYTES:
            while chunk := file.read(MIB):
                digest.update(chunk)
            return InputFile(name, size, f"sha256:{digest.hexdigest()}")
        for sample in range(SAMPLES):
            file.seek((size - MIB) * sample // (SAMPLES - 1))
            digest.update(file.read(MIB))
    return InputFile(name, size, f"sampled-sha256:{digest.hexdigest()}")


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
