"""All objects below a prefix of an S3 bucket, page by page, in the order of their keys' UTF-8 bytes.

s3fs' `find` is not asked: of a key that is also the prefix of others (`d` beside `d/x`) it shows the others alone.
Nor is botocore's parser: it needs 80 us a key, most of them for dates that nobody reads; here ElementTree reads what is
wanted in 5. The pages come through the file system's own client, with its credentials, retries and errors.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote_plus
from xml.etree import ElementTree

from botocore.parsers import ResponseParserError
from fsspec import AbstractFileSystem
from fsspec.asyn import sync

_ours = contextvars.ContextVar("a page of `pages` is being read", default=False)
_FOUND = "moonlight_objects"


class S3Object(NamedTuple):
    key: str  # within the bucket
    bytes: int
    etag: str  # without quotes


def below(fs: AbstractFileSystem, key: str) -> Iterator[list[S3Object]]:
    """The object `key` ("bucket/name") if there is one, and everything below the folder of that name, in pages."""
    bucket, _, name = key.partition("/")
    if name:
        first = next(pages(fs, bucket, name, MaxKeys=1), [])
        if first and first[0].key == name:  # of all keys that begin like it, it comes first
            yield first
    yield from pages(fs, bucket, name and f"{name}/")


def pages(fs: AbstractFileSystem, bucket: str, prefix: str, **more: int) -> Iterator[list[S3Object]]:
    """Up to 1,000 objects at a time whose keys begin with `prefix`. Raises FileNotFoundError for a bucket that is not there."""
    sync(fs.loop, fs.set_session)
    events = fs.s3.meta.events
    events.register("before-parse.s3.ListObjectsV2", _parse, unique_id="moonlight-listing")
    token: dict[str, str] = {}
    while True:
        answer = sync(fs.loop, _page, fs, {"Bucket": bucket, "Prefix": prefix, **more, **token})
        yield answer.get(_FOUND, [])
        if not answer.get("IsTruncated"):
            return
        token = {"ContinuationToken": answer["NextContinuationToken"]}


async def _page(fs: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    _ours.set(True)  # for this task alone
    answer: dict[str, Any] = await fs._call_s3("list_objects_v2", **arguments)
    return answer


def _parse(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: object) -> None:
    """botocore's hook: take the objects out of the body, and leave the rest to its parser."""
    if not _ours.get() or response_dict["status_code"] >= 300:
        return
    try:
        root = ElementTree.fromstring(response_dict["body"])
    except ElementTree.ParseError as error:
        raise ResponseParserError(f"S3 answered with a listing that is no XML: {error}") from error
    encoded = next((child.text for child in root if _name(child) == "EncodingType"), None) == "url"
    entries = [child for child in root if _name(child) == "Contents"]
    customized_response_dict[_FOUND] = [_object(entry, encoded) for entry in entries]
    for entry in entries:
        root.remove(entry)
    response_dict["body"] = ElementTree.tostring(root)


def _object(entry: ElementTree.Element, encoded: bool) -> S3Object:
    key, size, etag = "", 0, ""
    for field in entry:
        name = _name(field)
        if name == "Key":
            key = field.text or ""
        elif name == "Size":
            size = int(field.text or 0)
        elif name == "ETag":
            etag = (field.text or "").strip('"')
    return S3Object(unquote_plus(key) if encoded else key, size, etag)


def _name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]
