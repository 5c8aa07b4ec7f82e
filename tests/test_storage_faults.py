"""Every kind of request to S3 outlasts every kind of fault, and what a failed upload left is taken away."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.config.schema import StorageConfig
from pipeline.storage import UPLOAD_PART, Storage, open_storage
from tests.data_prep.faulty_s3 import FATES, FaultyS3

MULTIPART = 2 * UPLOAD_PART + 1000  # bytes: uploaded in three parts


@pytest.fixture
def faulty(bucket: tuple[str, str]) -> Iterator[tuple[Storage, FaultyS3]]:
    endpoint, name = bucket
    with FaultyS3(endpoint, 0, 0) as proxy:
        yield open_storage(StorageConfig(root=f"s3://{name}/root", endpoint_url=proxy.url, region="us-east-1")), proxy


def unfinished_uploads(storage: Storage) -> list[str]:
    bucket = storage.key("").partition("/")[0]
    return [upload["Key"] for upload in storage.fs.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", [])]


@pytest.mark.parametrize("fate", FATES)
def test_every_request_is_tried_again(faulty: tuple[Storage, FaultyS3], fate: str) -> None:
    storage, proxy = faulty
    data = os.urandom(100_000)
    storage.write("there/a", data)
    storage.write("there/b", b"b")

    def hurt(call: Callable[[], object]) -> object:
        proxy.script = [fate]
        result = call()
        assert not proxy.script
        return result

    def part() -> bytes:
        with storage.open("there/a") as file:
            file.seek(50_000)
            proxy.script = [fate]
            return file.read(10)

    assert hurt(lambda: storage.read("there/a")) == data
    assert hurt(lambda: [entry.path for entry in storage.list("there")]) == ["there/a", "there/b"]
    assert hurt(lambda: storage.exists("there/a"))
    assert not hurt(lambda: storage.exists("there/c"))
    assert hurt(lambda: storage.read_or_none("there/c")) is None
    etag = hurt(lambda: storage.etag("there/b"))
    assert part() == data[50_000:50_010]
    hurt(lambda: storage.write("written", data))
    assert storage.read("written") == data
    # whose answer is lost asks again and is told that somebody was faster
    lost = fate.endswith("after") or fate.endswith("within")
    assert hurt(lambda: storage.create("created", b"1")) or lost
    assert storage.read("created") == b"1"
    assert hurt(lambda: storage.swap("there/b", b"B", etag)) or lost
    assert storage.read("there/b") == b"B"
    hurt(lambda: storage.delete("there/b"))
    hurt(lambda: storage.delete("there"))
    assert storage.list("there") == []
    hurt(storage.check_writable)


@pytest.mark.parametrize("request_number", range(5))  # create, three parts, complete
@pytest.mark.parametrize("fate", ["503", "reset before", "cut after"])
def test_every_request_of_a_large_upload_is_tried_again(
    faulty: tuple[Storage, FaultyS3], tmp_path: Path, fate: str, request_number: int
) -> None:
    storage, proxy = faulty
    local = tmp_path / "large"
    local.write_bytes(os.urandom(MULTIPART))
    proxy.script = ["served"] * request_number + [fate]
    storage.upload(local, "large")
    assert storage.read("large") == local.read_bytes()
    assert proxy.faults == 1
    assert proxy.requests > 5


def test_a_server_that_denies_the_upload_it_completed(faulty: tuple[Storage, FaultyS3], tmp_path: Path) -> None:
    """The answer to the last request is lost, and the server does not know the upload any more when it is asked again."""
    storage, proxy = faulty
    local = tmp_path / "large"
    local.write_bytes(os.urandom(MULTIPART))
    proxy.script = ["served"] * 4 + ["cut after", "404", "404"]
    storage.upload(local, "large")
    assert proxy.requests == 7 + 5
    assert storage.read("large") == local.read_bytes()
    assert unfinished_uploads(storage) == []


def test_an_upload_that_fails_leaves_no_parts(faulty: tuple[Storage, FaultyS3], tmp_path: Path) -> None:
    storage, proxy = faulty
    local = tmp_path / "large"
    local.write_bytes(os.urandom(MULTIPART))
    proxy.script = ["served", "served", "403", "served", "503"]  # create, three parts, abort
    with pytest.raises(PermissionError, match="Access Denied"):
        storage.upload(local, "large")
    assert storage.list("") == []
    assert unfinished_uploads(storage) == []


def test_an_object_that_may_not_be_deleted_is_named(faulty: tuple[Storage, FaultyS3]) -> None:
    """The server answers 200, and in the answer that it refused."""
    storage, proxy = faulty
    storage.write("a/b", b"")
    proxy.script = ["served", "served", "not deleted"]  # list the object, list the folder, delete
    with pytest.raises(OSError, match=r"/root/a/b was not deleted: AccessDenied Access Denied"):
        storage.delete("a")
    assert storage.exists("a/b")


def test_a_conflict_of_conditional_writes_is_not_a_lost_race(faulty: tuple[Storage, FaultyS3]) -> None:
    """409: another one is under way, and may fail. Only 412 says that somebody was faster."""
    storage, proxy = faulty
    proxy.script = ["409", "409"]
    assert storage.create("a", b"1")
    proxy.script = ["409", "412"]
    assert not storage.create("b", b"1")
    proxy.script = ["409"] * 100
    with pytest.raises(OSError, match="conflicting conditional operation"):
        storage.create("c", b"1")
    proxy.script = ["403"]
    with pytest.raises(PermissionError):
        storage.create("d", b"1")


def test_a_folder_that_is_filled_while_it_is_listed(faulty: tuple[Storage, FaultyS3]) -> None:
    """An empty listing, and a moment later there is something: the folder itself is no object."""
    storage, proxy = faulty
    storage.write("folder/a", b"")
    proxy.script = ["nothing listed", "nothing listed"]
    assert storage.list("folder") == []
    assert [entry.path for entry in storage.list("folder")] == ["folder/a"]
