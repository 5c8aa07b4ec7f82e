"""Pages of a listing: what the expressions take out is what ElementTree does, and what they do not know they leave to it."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.s3_listing import S3Object, _by_elements, _by_expressions

HEAD = '<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name>'
MORE = "<IsTruncated>true</IsTruncated><NextContinuationToken>t/+=</NextContinuationToken>"
AMAZON = (
    "<Contents><Key>{0}</Key><LastModified>2026-11-28T00:00:00.000Z</LastModified><ETag>&quot;{1}&quot;</ETag>"
    "<ChecksumAlgorithm>CRC64NVME</ChecksumAlgorithm><ChecksumType>FULL_OBJECT</ChecksumType><Size>{2}</Size>"
    "<Owner><ID>1</ID><DisplayName>x</DisplayName></Owner><StorageClass>STANDARD</StorageClass></Contents>"
)
MINIO = '<Contents><Key>{0}</Key><LastModified>2026-11-28T00:00:00Z</LastModified><ETag>"{1}"</ETag><Size>{2}</Size></Contents>'
INDENTED = (
    "\n  <Contents>\n    <Key>{0}</Key>\n    <LastModified>x</LastModified>\n    <ETag>&#34;{1}&#34;</ETag>\n"
    "    <Size>{2}</Size>\n    <StorageClass>STANDARD</StorageClass>\n  </Contents>\n"
)
OTHER_ORDER = "<Contents><Size>{2}</Size><ETag>&quot;{1}&quot;</ETag><Key>{0}</Key></Contents>"


def page(*entries: str, encoding: str = "<EncodingType>url</EncodingType>", after: str = "") -> bytes:
    return f"{HEAD}{encoding}{MORE}{''.join(entries)}{after}</ListBucketResult>".encode()


def without_objects(body: bytes) -> list[tuple[str, str | None]]:
    return [(child.tag, child.text) for child in ElementTree.fromstring(body)]


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.sampled_from([AMAZON, MINIO, INDENTED]),
    st.sampled_from(["", "<EncodingType>url</EncodingType>"]),
    st.lists(
        st.tuples(st.text("ab/%2+é漢 >", min_size=1), st.text("0f-", max_size=4), st.integers(0, 2**50)), min_size=1
    ),
)
def test_expressions_take_out_what_elements_do(style: str, encoding: str, objects: list[tuple[str, str, int]]) -> None:
    body = page(*(style.format(*each) for each in objects), encoding=encoding)
    found = _by_expressions(body)
    assert found is not None
    expected, rest = _by_elements(body)
    assert found[0] == expected
    assert without_objects(found[1]) == without_objects(rest)
    assert len(found[0]) == len(objects)


@pytest.mark.parametrize(
    "body",
    [
        page(),
        page(OTHER_ORDER.format("a", "e", 1)),
        page(AMAZON.format("a", "e", 1), OTHER_ORDER.format("b", "e", 2)),
        page(AMAZON.format("a&amp;b", "e", 1), encoding=""),
        page(AMAZON.format("<![CDATA[a]]>", "e", 1)),
        page(AMAZON.format("a", "e", 1), "<!-- " + AMAZON.format("b", "e", 2) + " -->"),
        page(AMAZON.format("a", "e", 1), "<IsTruncated>true</IsTruncated>", AMAZON.format("b", "e", 2)),
        page(AMAZON.format("a", "e", 1), "<x:Contents xmlns:x='y'></x:Contents>"),
        page(AMAZON.format("a Contents> b", "e", 1)),
        b"<Error><Code>InternalError</Code></Error>",
    ],
)
def test_what_is_written_otherwise_is_left_to_elements(body: bytes) -> None:
    assert _by_expressions(body) is None
    _by_elements(body)


def test_quotes_and_names_are_undone() -> None:
    found = _by_expressions(page(AMAZON.format("a+b%2Fc", "e-2", 7)))
    assert found is not None
    assert found[0] == [S3Object("a b/c", 7, "e-2")]
