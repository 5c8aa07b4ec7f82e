"""Every byte in or out: one `Storage` rooted at a folder or at `s3://bucket/prefix`.

Paths are relative to the root and use '/'. A write is atomic (readers see the old object, the new one, or none) and a
commit is one conditional write: `create` succeeds for exactly one of any number of writers, `swap` replaces an object
only if nobody changed it since it was read. Nothing is renamed or edited in place once it is visible.

On a folder: temporary file + fsync + link/rename. On S3: one PUT with `If-None-Match: *` or `If-Match: <etag>`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
import psutil

from pipeline.config.schema import StorageConfig
from pipeline.s3_listing import below

CHUNK = 8 * 1024 * 1024
UPLOAD_PART = 16 * 1024 * 1024  # files of two and more are uploaded in parts
CONFLICTS = 10  # of one conditional write with others
UPLOADS = 3  # that are tried for one file
DELETIONS = 100  # of its folder that one write outlasts


class StorageError(ValueError):
    """The storage cannot be used as configured; the message names the root and the remedy."""


@dataclass(frozen=True)
class ObjectInfo:
    path: str  # relative to the root
    bytes: int
    etag: str  # changes whenever the content does; opaque


class Storage:
    """Objects under one root. Construct with `open_storage(config)`."""

    def __init__(self, config: StorageConfig) -> None:
        self.config = config
        self.root = config.root.rstrip("/") if config.is_s3 else str(Path(config.root).expanduser().absolute())
        self.fs = filesystem(config.root, config)
        self._prefix = self.root.removeprefix("s3://")

    # -- names ---------------------------------------------------------------------------------------------------

    def key(self, path: str) -> str:
        """The full key that `self.fs` understands (no scheme)."""
        assert not path.startswith("/"), path
        assert ".." not in path.split("/"), path
        return f"{self._prefix}/{path}" if path else self._prefix

    def uri(self, path: str = "") -> str:
        """What a user would type: an absolute path or an s3:// URI."""
        return f"{self.root}/{path}" if path else self.root

    # -- read ----------------------------------------------------------------------------------------------------

    def read(self, path: str) -> bytes:
        """The whole object, on S3 in one request: of an object that is replaced meanwhile, one or the other. Raises
        FileNotFoundError."""
        alone = {"max_concurrency": 1} if self.config.is_s3 else {}
        with self._naming(path):
            data: bytes = self.fs.cat_file(self.key(path), **alone)
        return data

    def read_or_none(self, path: str) -> bytes | None:
        try:
            return self.read(path)
        except FileNotFoundError:
            return None

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer where the object ends before; on S3 in one request. Raises FileNotFoundError."""
        try:
            data: bytes = self.fs.cat_file(self.key(path), start=start, end=stop)
        except OSError as error:
            response = getattr(error.__cause__, "response", {})
            if response.get("Error", {}).get("Code") == "InvalidRange":
                return b""
            raise
        return data

    def open(self, path: str) -> IO[bytes]:
        """A seekable binary file; ranged reads on S3."""
        file: IO[bytes] = self.fs.open(self.key(path), "rb")
        return file

    def exists(self, path: str) -> bool:
        return bool(self.fs.exists(self.key(path)))

    def list(self, prefix: str) -> list[ObjectInfo]:
        """All objects below a folder, and one of its own name, sorted by path. Unfinished temporaries are not shown."""
        if self.config.is_s3:
            return sorted(self._below(prefix), key=lambda entry: entry.path)
        try:
            found: dict[str, dict[str, Any]] = self.fs.find(self.key(prefix), detail=True)
        except FileNotFoundError:
            return []
        start = len(self._prefix) + 1
        entries = [
            ObjectInfo(key[start:], int(info["size"]), _etag(info))
            for key, info in found.items()
            if info["type"] != "directory" and ".tmp-" not in key[start:]
        ]
        return sorted(entries, key=lambda entry: entry.path)

    def names(self, prefix: str) -> Sequence[str]:
        """Names directly below a folder, of objects and of folders, in any order; nothing else about them is looked at."""
        try:
            if self.config.is_s3:
                found = self.fs.ls(self.key(prefix), detail=False)
                return [name for key in found if ".tmp-" not in (name := key.rstrip("/").rsplit("/", 1)[1])]
            return [name for name in os.listdir(self.key(prefix)) if ".tmp-" not in name]
        except (FileNotFoundError, NotADirectoryError):
            return []

    # -- write ---------------------------------------------------------------------------------------------------

    def write(self, path: str, data: bytes) -> None:
        """Put the object, replacing any. Atomic."""
        if self.config.is_s3:
            with self._naming(path):
                self.fs.pipe_file(self.key(path), data)
            return
        self._place(path, lambda temporary: temporary.write_bytes(data), os.replace)

    def create(self, path: str, data: bytes) -> bool:
        """Put the object if there is none; False if there is. Of concurrent writers exactly one gets True.

        On S3 a writer whose answer was lost asks again and gets False for its own object: who is told False compares.
        """
        if self.config.is_s3:
            return self._put_if(path, data, IfNoneMatch="*")
        try:
            self._place(path, lambda temporary: temporary.write_bytes(data), os.link)
        except FileExistsError:
            return False
        return True

    def swap(self, path: str, data: bytes, etag: str | None) -> bool:
        """Replace the object if its etag still is `etag` (None: if it does not exist). False if somebody was faster."""
        if etag is None:
            return self.create(path, data)
        if self.config.is_s3:
            try:
                return self._put_if(path, data, IfMatch=etag)
            except FileNotFoundError:  # deleted meanwhile
                return False
        import fcntl

        lock = Path(self.key(path) + ".tmp-lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as handle:  # writers of a folder meet here; the kernel frees the lock of a dead one
            fcntl.flock(handle, fcntl.LOCK_EX)
            if self.etag(path) != etag:
                return False
            self.write(path, data)
        return True

    def etag(self, path: str) -> str | None:
        """The content's tag, None without an object. On a folder: the sha256 of the content."""
        try:
            if self.config.is_s3:
                return _etag(self.fs.info(self.key(path), refresh=True))
            return hashlib.sha256(self.read(path)).hexdigest()
        except FileNotFoundError:
            return None

    def upload(self, local: Path, path: str) -> None:
        """Put a local file (multipart on S3 where large), replacing any. Atomic. The file must not change afterwards."""
        if self.config.is_s3:
            for left in reversed(range(UPLOADS)):
                try:  # 64 MiB in flight; s3fs aborts a multipart upload that fails
                    self.fs.put_file(str(local), self.key(path), chunksize=UPLOAD_PART, max_concurrency=4)
                    return
                except FileNotFoundError:  # the last answer was lost, and the upload is over when asked again
                    if not left:
                        raise

        def fill(temporary: Path) -> None:
            temporary.touch()
            mode = temporary.stat().st_mode  # of any file that is made here; a local file may be its owner's alone
            temporary.unlink()
            try:
                os.link(local, temporary)
            except OSError:  # another file system
                shutil.copyfile(local, temporary)
            temporary.chmod(mode)

        self._place(path, fill, os.replace)

    def delete(self, prefix: str) -> None:
        """Remove an object or everything below a folder. Nothing there is fine; what others put there meanwhile may stay."""
        if self.config.is_s3:
            bucket = self.key("").partition("/")[0]
            for page in below(self.fs, self.key(prefix)):  # at most as many as one request deletes
                if page:
                    self._delete_keys(bucket, [found.key for found in page])
            return
        target = Path(self.key(prefix))
        try:
            target.unlink(missing_ok=True)
        except (IsADirectoryError, PermissionError):  # macOS answers the second
            shutil.rmtree(target, onerror=_unless_shared)

    def sweep(self, prefix: str) -> None:
        """Remove what killed processes of this machine left half-written below a folder. On S3 there is nothing to see."""
        if self.config.is_s3:
            return
        for leftover in Path(self.key(prefix)).rglob("*.tmp-*-*"):
            host, _, pid = leftover.name.rpartition(".tmp-")[2].rpartition("-")[0].rpartition("-")
            if host == socket.gethostname() and pid.isdigit() and not _lives(int(pid)):
                leftover.unlink(missing_ok=True)

    @contextlib.contextmanager
    def stream(self, path: str) -> Iterator[IO[bytes]]:
        """Write an object from front to back, replacing any, there and durable when the block ends without an error. Atomic.
        Large ones need no memory."""
        with self._naming(path):
            if self.config.is_s3:
                upload = self.fs.open(self.key(path), "wb", block_size=UPLOAD_PART)
                try:
                    yield upload
                except BaseException:
                    upload.discard()
                    upload.closed = True  # closing, which its destructor does, would complete what there is
                    raise
                try:
                    upload.close()
                except FileNotFoundError:  # the last answer was lost, and the upload is over when asked again
                    if self.fs.info(self.key(path), refresh=True)["size"] != upload.loc:
                        raise
                return
            target = Path(self.key(path))
            temporary = _temporary(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)

    def check_writable(self) -> None:
        """Write and delete one small object; raises StorageError that says why and what to change."""
        probe = f".probe-{uuid.uuid4().hex}"
        try:
            self.write(probe, b"")
            self.delete(probe)
        except Exception as error:
            raise StorageError(
                f"storage.root: cannot write to {self.root} ({type(error).__name__}: {error}); "
                "choose a writable folder, or an s3:// prefix whose credentials allow PutObject"
            ) from error

    # -- inside --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _naming(self, path: str) -> Iterator[None]:
        """An error of the storage says of which object: neither a full disk's nor an S3 server's does by itself."""
        try:
            yield
        except OSError as error:
            if error.filename is not None or isinstance(error, FileNotFoundError | FileExistsError):
                raise
            if error.errno is not None:
                raise OSError(error.errno, error.strerror, self.uri(path)) from error
            if isinstance(error, PermissionError):  # as s3fs raises it
                raise PermissionError(f"{error}: {self.uri(path)!r}") from error
            raise

    def _place(self, path: str, fill: Callable[[Path], object], place: Callable[[Path, Path], object]) -> None:
        """On a folder: fill a temporary file beside the object, sync it, then `place` it (link or rename) in one step."""
        target = Path(self.key(path))
        for left in reversed(range(DELETIONS)):
            temporary = _temporary(target)
            try:
                with contextlib.suppress(FileExistsError):  # raised, too, when it is deleted while we look at it
                    target.parent.mkdir(parents=True, exist_ok=True)
                with self._naming(path):
                    fill(temporary)
                    _sync(temporary)
                place(temporary, target)
                return
            except FileNotFoundError:  # somebody deleted the folder between two of these lines
                if not left:
                    raise
            finally:
                temporary.unlink(missing_ok=True)

    def _below(self, prefix: str) -> Iterator[ObjectInfo]:
        start = len(self.key("").partition("/")[2])
        start += 1 if start else 0
        try:
            for page in below(self.fs, self.key(prefix)):
                for key, size, etag in page:
                    if not key.endswith("/"):  # what consoles make for an empty folder
                        yield ObjectInfo(key[start:], size, etag)
        except FileNotFoundError:  # no such bucket
            return

    def _delete_keys(self, bucket: str, keys: Sequence[str]) -> None:
        """Delete up to 1,000 objects in one request, whose answer may be 200 and yet hold errors of single objects."""
        names = [{"Key": key} for key in keys]
        answer = self.fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": names, "Quiet": True})
        for error in answer.get("Errors", []):
            raise OSError(
                f"s3://{bucket}/{error.get('Key')} was not deleted: {error.get('Code')} {error.get('Message')}"
            )

    def _put_if(self, path: str, data: bytes, **condition: str) -> bool:
        bucket, _, name = self.key(path).partition("/")
        for left in reversed(range(CONFLICTS)):
            try:
                self.fs.call_s3("put_object", Bucket=bucket, Key=name, Body=data, **condition)
                break
            except Exception as error:
                code = _condition_code(error)
                if code == "PreconditionFailed":
                    return False
                if code != "ConditionalRequestConflict" or not left:
                    raise
                time.sleep(random.uniform(0, 0.2))  # another conditional write is under way: ask again who won
        self.fs.invalidate_cache(self.fs._parent(self.key(path)))
        return True


def open_storage(config: StorageConfig) -> Storage:
    return Storage(config)


def filesystem(uri: str, config: StorageConfig) -> fsspec.AbstractFileSystem:
    """The fsspec file system for a URI. Listings are never cached: another process may have written since."""
    if not uri.startswith("s3://"):
        return fsspec.filesystem("file")
    client: dict[str, Any] = {}
    if config.region:
        client["region_name"] = config.region
    retries = {"retries": {"max_attempts": 10, "mode": "standard"}}
    return fsspec.filesystem(
        "s3", endpoint_url=config.endpoint_url, client_kwargs=client, config_kwargs=retries, use_listings_cache=False
    )


def said_by_storage(error: BaseException) -> str:
    """One line for somebody whose command an error of the storage has ended, with what to do."""
    return (
        f"storage: {' '.join(str(error).split()) or type(error).__name__}; once it works again the same command goes on"
    )


def sha256_of(file: IO[bytes]) -> str:
    """sha256 of a stream, in constant memory."""
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _lives(pid: int) -> bool:
    """One that was killed and that nobody has reaped, as in containers whose first process does not, does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _temporary(target: Path) -> Path:
    """Beside the object, with a name that `sweep` knows the writer by."""
    return target.with_name(f"{target.name}.tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}")


def _etag(info: dict[str, Any]) -> str:
    if "ETag" in info:
        return str(info["ETag"]).strip('"')
    return f"{info['size']}-{info.get('mtime', 0)!r}"


def _unless_shared(function: object, path: str, error: tuple[type, BaseException, object]) -> None:
    """For rmtree: another process deletes the same folder, or writes there."""
    if function is os.path.islink and not os.path.islink(path):
        return  # the folder was deleted and made anew while rmtree looked at it, which it takes for a link
    if getattr(error[1], "errno", None) not in {errno.ENOENT, errno.ENOTEMPTY}:
        raise error[1]


def _sync(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def _condition_code(error: BaseException | None) -> str:
    """PreconditionFailed (HTTP 412) or ConditionalRequestConflict (409), however deep s3fs wrapped it; '' for anything else."""
    names = {"412": "PreconditionFailed", "409": "ConditionalRequestConflict"}
    while error is not None:
        code = str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))
        code = names.get(code, code)
        if code in names.values():
            return code
        if isinstance(error, FileExistsError) or (isinstance(error, OSError) and "PreconditionFailed" in str(error)):
            return "PreconditionFailed"
        error = error.__cause__ or error.__context__
    return ""
