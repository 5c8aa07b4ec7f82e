"""All objects below a prefix of an S3 bucket, page by page, in the order of their keys' UTF-8 bytes.

s3fs' `find` is not asked: of a key that is also the prefix of others (`d` beside `d/x`) it shows the others alone.
Nor is botocore's parser: it needs 80 us a key, most of them for dates that nobody reads. Here regular expressions take out what
is wanted in 2, and ElementTree where a page is not as every server writes it. The pages come through the file system's
own client, with its credentials, retries and errors.
"""

from __future__ import annotations

import contextvars
import re
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote_plus
from xml.etree import ElementTree

from botocore.parsers import ResponseParserError
from fsspec import AbstractFileSystem
from fsspec.asyn import sync

_ours = contextvars.ContextVar("a page of `pages` is being read", default=False)
_FOUND = "moonlight_objects"
# As Amazon, MinIO, Ceph and moto write an object; what follows its size is not read.
_QUOTE = rb"(?:&quot;|&#34;|\")?"
_ENTRY = re.compile(
    rb"<Contents>\s*<Key>([^<&]+)</Key>\s*<LastModified>[^<]*</LastModified>\s*<ETag>%b([^<&\"]*)%b</ETag>\s*"
    rb"(?:<Checksum\w+>[^<]*</Checksum\w+>\s*)*<Size>(\d+)</Size>" % (_QUOTE, _QUOTE)
)


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
    # the wildcard makes it come before the handlers of all of S3's answers, one of which parses the body, too
    events.register_first("before-parse.*.ListObjectsV2", _parse, unique_id="moonlight-listing")
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
    """botocore's hook, before its own, which would parse the whole body twice: take the objects out, and leave the rest."""
    if not _ours.get() or response_dict["status_code"] >= 300:
        return
    body = response_dict["body"]
    found, rest = _by_expressions(body) or _by_elements(body)
    customized_response_dict[_FOUND] = found
    response_dict["body"] = rest


def _by_expressions(body: bytes) -> tuple[list[S3Object], bytes] | None:
    """The objects of a page, and the page without them; None if any is written in another way than `_ENTRY`."""
    found = _ENTRY.findall(body)
    first, last = body.find(b"<Contents>"), body.rfind(b"</Contents>") + len(b"</Contents>")
    if not found or len(found) != body.count(b"Contents>") / 2 or b"<!" in body:
        return None
    rest = body[:first] + body[last:]
    if any(rest.count(name) != body.count(name) for name in (b"<IsTruncated>", b"<NextContinuationToken>")):
        return None
    names = [key.decode() for key, _, _ in found]
    if b"<EncodingType>url</EncodingType>" in rest:
        names = [unquote_plus(name) if "%" in name or "+" in name else name for name in names]
    return [S3Object(name, int(size), etag.decode()) for name, (_, etag, size) in zip(names, found)], rest


def _by_elements(body: bytes) -> tuple[list[S3Object], bytes]:
    try:
        root = ElementTree.fromstring(body)
    except ElementTree.ParseError as error:
        raise ResponseParserError(f"S3 answered with a listing that is no XML: {error}") from error
    space = root.tag.rpartition("}")[0]
    space += "}" if space else ""
    encoded = root.findtext(f"{space}EncodingType") == "url"
    key, size, etag = f"{space}Key", f"{space}Size", f"{space}ETag"
    found = []
    for entry in root.findall(f"{space}Contents"):
        name = entry.findtext(key) or ""
        name = unquote_plus(name) if encoded and ("%" in name or "+" in name) else name
        found.append(S3Object(name, int(entry.findtext(size) or 0), (entry.findtext(etag) or "").strip('"')))
    root[:] = [child for child in root if child.tag != f"{space}Contents"]
    return found, ElementTree.tostring(root)
