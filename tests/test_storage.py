"""The contract of storage, on a folder and on a real S3 server alike."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest

from pipeline.config.schema import StorageConfig
from pipeline.storage import UPLOAD_PART, Storage, StorageError, open_storage, sha256_of

WRITERS = 8


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return open_storage(StorageConfig(root=str(tmp_path / "root")))
    return open_storage(request.getfixturevalue("s3_root"))


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    return open_storage(StorageConfig(root=str(tmp_path)))


def names(storage: Storage, prefix: str = "") -> list[str]:
    return [entry.path for entry in storage.list(prefix)]


@pytest.mark.parametrize("size", [10, UPLOAD_PART + 10])
def test_a_stream_that_breaks_off_leaves_what_was_there(storage: Storage, size: int) -> None:
    """Of one part and of several; s3fs by itself completes what was written until then (findings/)."""
    storage.write("a/b", b"before")

    def break_off() -> None:
        with storage.stream("a/b") as out:
            out.write(b"x" * size)
            raise KeyError("half-way")

    with pytest.raises(KeyError, match="half-way"):
        break_off()
    assert storage.read("a/b") == b"before"
    assert names(storage) == ["a/b"]
    with storage.stream("a/b") as out:
        out.write(b"y" * size)
    assert storage.read("a/b") == b"y" * size


def test_write_read_list_delete(storage: Storage) -> None:
    assert storage.list("") == []
    assert storage.list("runs") == []
    assert storage.read_or_none("runs/a.json") is None
    with pytest.raises(FileNotFoundError):
        storage.read("runs/a.json")
    contents = {"runs/a.json": b"1", "runs/ab/c.json": b"", "runs/a/\u6708 b.bin": bytes(range(256)), "z": b"zz"}
    for path, data in contents.items():
        storage.write(path, data)
    assert {path: storage.read(path) for path in contents} == contents
    assert names(storage) == sorted(contents)
    assert names(storage, "runs/a") == ["runs/a/\u6708 b.bin"]  # a folder, not a prefix of names
    assert [entry.bytes for entry in storage.list("runs")] == [1, 256, 0]
    storage.write("z", b"other")
    assert storage.read("z") == b"other"
    assert storage.exists("runs/a.json")
    storage.delete("runs/a")
    assert names(storage) == ["runs/a.json", "runs/ab/c.json", "z"]
    storage.delete("runs/a.json")
    storage.delete("runs/a.json")  # nothing there is fine
    storage.delete("none/at/all")
    assert not storage.exists("runs/a.json")
    assert names(storage) == ["runs/ab/c.json", "z"]


def test_a_key_that_is_also_a_prefix_of_others(s3_root: StorageConfig) -> None:
    """`d` beside `d/x`: no folder can hold that, S3 can. Asked for `d`, s3fs' own `find` shows `d/x` alone."""
    storage = open_storage(s3_root)
    paths = ["d", "d/x", "d/x/y", "d/x/y z+%41&amp;", "d.1", "dd", "e/d"]
    for path in paths:
        storage.write(path, path.encode())
    assert names(storage) == sorted(paths)
    assert [(entry.path, entry.bytes, entry.etag) for entry in storage.list("d/x")] == [
        (path, len(path), storage.etag(path)) for path in ("d/x", "d/x/y", "d/x/y z+%41&amp;")
    ]
    storage.delete("d/x")
    assert names(storage) == ["d", "d.1", "dd", "e/d"]
    storage.write("d/z", b"")
    storage.delete("d")
    assert names(storage) == ["d.1", "dd", "e/d"]


def test_more_objects_than_one_request_lists(s3_root: StorageConfig) -> None:
    storage = open_storage(s3_root)
    paths = [f"many/{number:04d}" for number in range(2100)]
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(lambda path: storage.write(path, b""), ["other", *paths]))
    assert names(storage, "many") == paths
    assert len(storage.fs.ls(storage.key("many"))) == 2100  # the client's own listings are as before
    storage.delete("many")
    assert names(storage) == ["other"]


def test_open_reads_ranges(storage: Storage) -> None:
    data = os.urandom(100_000)
    storage.write("x", data)
    with storage.open("x") as file:
        file.seek(70_000)
        assert file.read(10) == data[70_000:70_010]
        file.seek(0)
        assert sha256_of(file) == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("size", [0, 1000, 2 * UPLOAD_PART + 1000])  # the last in parts, on S3
def test_upload(storage: Storage, tmp_path: Path, size: int) -> None:
    local = tmp_path / "local"
    local.write_bytes(os.urandom(size))
    storage.write("deep/er/file", b"before")
    storage.upload(local, "deep/er/file")
    assert storage.read("deep/er/file") == local.read_bytes()
    assert names(storage) == ["deep/er/file"]


def test_uri_and_key(storage: Storage) -> None:
    assert storage.uri("a/b") == f"{storage.root}/a/b"
    assert storage.uri() == storage.root
    if storage.config.is_s3:
        assert storage.key("a") == storage.root.removeprefix("s3://") + "/a"
    else:
        assert Path(storage.key("a")).is_absolute()
    for bad in ("/etc/passwd", "../up", "a/../../b"):
        with pytest.raises(AssertionError):
            storage.key(bad)


def test_a_bucket_without_a_prefix(bucket: tuple[str, str]) -> None:
    storage = open_storage(StorageConfig(root=f"s3://{bucket[1]}/", endpoint_url=bucket[0]))
    assert storage.create("a/b", b"1")
    assert names(storage) == ["a/b"]
    assert storage.uri("a") == f"s3://{bucket[1]}/a"


def test_the_etag_changes_with_the_content_and_nothing_else(storage: Storage) -> None:
    assert storage.etag("x") is None
    storage.write("x", b"1")
    first = storage.etag("x")
    storage.write("x", b"2")
    assert storage.etag("x") not in (None, first)
    storage.write("x", b"1")
    assert storage.etag("x") == first
    storage.delete("x")
    assert storage.etag("x") is None


def in_threads(work: Callable[[int], object]) -> list[object]:
    with ThreadPoolExecutor(WRITERS) as pool:
        return list(pool.map(work, range(WRITERS)))


def test_create_succeeds_once_among_threads(storage: Storage) -> None:
    for attempt in range(3):
        path = f"commit/{attempt}"
        won = in_threads(lambda number, path=path: storage.create(path, b"%d" % number))
        assert won.count(True) == 1
        assert storage.read(path) == b"%d" % won.index(True)
    assert names(storage) == ["commit/0", "commit/1", "commit/2"]


def create_in_process(config: StorageConfig, number: int, barrier, results) -> None:  # type: ignore[no-untyped-def]
    storage = open_storage(config)
    barrier.wait()
    results.put((number, [storage.create(f"commit/{attempt}", b"%d" % number) for attempt in range(5)]))


def test_create_succeeds_once_among_processes(storage: Storage) -> None:
    context = multiprocessing.get_context("forkserver")  # imports once, and forks from a process without threads
    context.set_forkserver_preload(["tests.test_storage", "s3fs"])
    barrier, results = context.Barrier(WRITERS), context.Queue()
    arguments = (barrier, results)
    processes = [
        context.Process(target=create_in_process, args=(storage.config, number, *arguments))
        for number in range(WRITERS)
    ]
    for process in processes:
        process.start()
    answers = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    for attempt in range(5):
        winners = [number for number, won in answers.items() if won[attempt]]
        assert [b"%d" % number for number in winners] == [storage.read(f"commit/{attempt}")]


def test_swap_loses_no_update(storage: Storage) -> None:
    """Eight threads add five each to one counter, each by reading and swapping until it works."""

    def add(_: int) -> int:
        lost = 0
        for _ in range(5):
            while True:
                etag = storage.etag("counter")
                now = int(storage.read("counter")) if etag else 0
                if storage.swap("counter", b"%d" % (now + 1), etag):
                    break
                lost += 1
        return lost

    in_threads(add)
    assert storage.read("counter") == b"%d" % (WRITERS * 5)
    assert names(storage) == ["counter"]


def test_swap_compares(storage: Storage) -> None:
    assert storage.swap("x", b"1", None)
    assert not storage.swap("x", b"2", None)
    old = storage.etag("x")
    assert storage.swap("x", b"2", old)
    assert not storage.swap("x", b"3", old)
    assert storage.read("x") == b"2"
    current = storage.etag("x")
    storage.delete("x")
    assert not storage.swap("x", b"4", current)  # somebody deleted it
    assert not storage.exists("x")


def test_temporaries_are_never_listed_and_dead_ones_are_swept(folder: Storage, tmp_path: Path) -> None:
    folder.write("a/data", b"1")
    folder.swap("a/data", b"2", folder.etag("a/data"))
    host = socket.gethostname()
    gone = subprocess.Popen(["true"])
    gone.wait()
    dead = tmp_path / "a" / f"data.tmp-{host}-{gone.pid}-0123"
    alive = tmp_path / "a" / f"data.tmp-{host}-{os.getpid()}-0123"
    elsewhere = tmp_path / "a" / f"data.tmp-another-host-{gone.pid}-0123"
    killed = subprocess.Popen(["true"])
    os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)  # it is over, and nobody has reaped it
    zombie = tmp_path / "a" / f"data.tmp-{host}-{killed.pid}-0123"
    for path in (dead, alive, elsewhere, zombie):
        path.write_bytes(b"half")
    assert names(folder) == ["a/data"]
    folder.sweep("")
    assert [path.exists() for path in (dead, alive, elsewhere, zombie)] == [False, True, True, False]
    killed.wait()
    assert folder.read("a/data") == b"2"


def test_a_root_below_a_folder_named_like_a_temporary(tmp_path: Path) -> None:
    storage = open_storage(StorageConfig(root=str(tmp_path / "x.tmp-1")))
    storage.write("a", b"")
    assert names(storage) == ["a"]


def test_a_failed_write_leaves_nothing(folder: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    folder.write("x", b"old")
    monkeypatch.setattr("pipeline.storage._sync", full)
    for write in (folder.write, folder.create):
        with pytest.raises(OSError, match="No space"):
            write("x", b"new")
    assert folder.read("x") == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_check_writable(storage: Storage) -> None:
    storage.check_writable()
    assert storage.list("") == []


def refusal(storage: Storage) -> str:
    with pytest.raises(StorageError) as error:
        storage.check_writable()
    message = str(error.value)
    assert message.startswith(f"storage.root: cannot write to {storage.root} (")
    assert "choose a writable folder, or an s3:// prefix" in message
    assert "\n" not in message
    return message


def test_a_folder_below_a_file_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "NotADirectoryError" in refusal(open_storage(StorageConfig(root=str(tmp_path / "file" / "root"))))


def test_a_missing_bucket_is_not_writable(s3_root: StorageConfig) -> None:
    missing = s3_root.model_copy(update={"root": "s3://no-such-bucket/root"})
    assert "bucket does not exist" in refusal(open_storage(missing))


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)


def test_no_credentials(s3_server: str, no_credentials: None) -> None:
    # a name for the server that no other test uses: fsspec keeps a client for each, with its credentials
    endpoint = s3_server.replace("127.0.0.1", "localhost")
    storage = open_storage(StorageConfig(root="s3://bucket/root", endpoint_url=endpoint, region="us-east-1"))
    assert "NoCredentialsError: Unable to locate credentials" in refusal(storage)


def test_an_uploaded_file_is_as_readable_as_a_written_one(tmp_path: Path) -> None:
    """safetensors makes files of mode 600; a published model is for others, too."""
    storage = Storage(StorageConfig(root=str(tmp_path / "root")))
    local = tmp_path / "local"
    local.write_bytes(b"x")
    local.chmod(0o600)
    storage.write("written", b"x")
    storage.upload(local, "uploaded")
    assert (tmp_path / "root/uploaded").stat().st_mode == (tmp_path / "root/written").stat().st_mode


def test_a_folder_that_is_made_anew_while_it_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rmtree finds another folder under the name than a moment ago and takes it for a symbolic link."""
    storage = Storage(StorageConfig(root=str(tmp_path)))
    storage.write("shared/folder/file", b"x")
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "samestat", lambda one, two: False)
        storage.delete("shared/folder")
    storage.delete("shared/folder")
    assert not (tmp_path / "shared/folder").exists()


def test_writers_outlast_whoever_deletes_their_folder(storage: Storage) -> None:
    def write(writer: int) -> None:
        for number in range(30):
            storage.create(f"shared/folder/{writer}-{number}", b"x")
            storage.write(f"shared/folder/{writer}", b"y")

    def delete(_: int) -> None:
        for _ in range(60):
            storage.delete("shared/folder")

    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(write, number) for number in range(4)] + [pool.submit(delete, 0) for _ in range(4)]
        for call in calls:
            call.result()
    storage.delete("shared")
    assert names(storage) == []
