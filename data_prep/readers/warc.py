"""WARC, as crawlers write it: the main text of a web page is a document. The extra `warc` brings warcio and Resiliparse.

    response, resource    HTML and XHTML with status 200: decoded, Resiliparse's main content as plain text; text/plain as it is
    conversion            the text that somebody has extracted (WET)

Other records are no documents. Pages that cannot be are counted as filtered: `http_status`, `not_html`, `content_encoding`, `too_deep`,
`no_main_content`. A location is the file and the record's number in it, from 0. `id_field` and `where` may name `url`, `date`, `record_id`,
`status` (a number; null of what is no response) and `content_type`.

Bytes are decoded by the response's charset, or what the page says of itself, or its looks; undecodable ones become U+FFFD. Resiliparse takes
time in the square of how deep elements lie in each other (0.04 s at 2,000), so pages deeper than DEEPEST, as no person makes them, are left out.

Files are decompressed and cut into records by warcio, which raises for damage where others give a shorter page. A file is one slice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO, Any

from data_prep.plan import Slice
from data_prep.readers.compression import decompressed
from data_prep.readers.record import DATA_ERRORS, EXCERPT_BYTES, ReaderSettings, Record, checked, corrupt, field, judged

DEEPEST = 2000
FACTS = ("url", "date", "record_id", "status", "content_type")  # that settings may name
HTML, TEXT = frozenset({"text/html", "application/xhtml+xml"}), "text/plain"
ENCODINGS = frozenset({"", "identity", "gzip", "deflate"})  # that warcio undoes; brotli it does not with brotli 1.2
READ_BYTES = 1024 * 1024
# Start and end tags of elements that nest: no void ones, and none whose end a browser supplies
_TAG = re.compile(
    rb"<(/?)(?!(?:area|base|br|col|embed|hr|img|input|link|meta|param|source|track|wbr|p|li|d[dt]|t[rdh]|tbody|thead|tfoot|option|optgroup)\b)"
    rb"[a-zA-Z][^<>]*?(/?)>"
)


def read_warc(part: Slice, file: IO[bytes], settings: ReaderSettings) -> Iterator[Record]:
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed
    from warcio.statusandheaders import StatusAndHeadersParserException

    location = part.path
    try:
        for number, record in enumerate(ArchiveIterator(decompressed(part.path, file))):
            location = f"{part.path}#{number}"
            if record.format != "warc":  # warcio takes any words for a header of ARC, the format before
                raise ArchiveLoadFailed("this is no record of WARC")
            if record.rec_type in ("response", "resource", "conversion"):
                yield _document(record, location, settings)
                _to_the_end(record)
    except DATA_ERRORS as error:
        yield corrupt(location, error)
    except (ArchiveLoadFailed, StatusAndHeadersParserException) as error:
        what = f"{type(error).__name__}: {error}".encode(errors="backslashreplace")
        yield Record(location, reason="corrupt_file", excerpt=what[:EXCERPT_BYTES])


def _document(record: Any, location: str, settings: ReaderSettings) -> Record:
    facts = _facts(record)
    doc_id = field(facts, settings.id_field) if settings.id_field else location
    found = Record(location, doc_id=doc_id if isinstance(doc_id, str) else location)
    headers = record.http_headers
    if facts["status"] not in (None, 200):
        found.rejected = "http_status"
    elif facts["content_type"] not in (*HTML, TEXT):
        found.rejected = "not_html"
    elif headers is not None and (headers.get_header("Content-Encoding") or "").strip().lower() not in ENCODINGS:
        found.rejected = "content_encoding"
    if found.rejected:
        return found
    body = _body(record, settings.max_document_bytes)
    if len(body) > settings.max_document_bytes:
        return Record(location, reason="too_large", excerpt=body[:EXCERPT_BYTES])
    if facts["content_type"] == TEXT:
        found.text = body if headers is None else _decoded(body, headers).encode()
        found = checked(found)
    elif too_deep(body):
        found.rejected = "too_deep"
    else:
        from resiliparse.extract.html2text import extract_plain_text

        found.text = extract_plain_text(_decoded(body, headers), main_content=True).strip().encode()
        found.rejected = "" if found.text else "no_main_content"
    if settings.where:
        found = judged(found, settings.where, (field(facts, condition.field) for condition in settings.where))
    return found


def _facts(record: Any) -> dict[str, Any]:
    own, http = record.rec_headers, record.http_headers
    status = None if http is None or record.rec_type != "response" else http.get_statuscode()
    kind = (own if http is None else http).get_header("Content-Type") or ""
    kind = kind.partition(";")[0].strip().lower()
    number = None if status is None else int(status) if status.isdecimal() else 0
    names = ("WARC-Target-URI", "WARC-Date", "WARC-Record-ID")
    return dict(zip(FACTS, [*map(own.get_header, names), number, kind]))


def _body(record: Any, limit: int) -> bytes:
    """What was sent, content and transfer encodings undone; of more than `limit` a byte more."""
    stream, pieces, size = record.content_stream(), [], 0
    while size <= limit and (piece := stream.read(min(READ_BYTES, limit + 1 - size))):
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)


def _to_the_end(record: Any) -> None:
    """Raises OSError if the file ends inside the record: what was read of it is not all."""
    while record.raw_stream.read(READ_BYTES):
        pass
    if getattr(record.raw_stream, "limit", 0) > 0:
        raise OSError(f"the file ends {record.raw_stream.limit} bytes before the record does")


def _decoded(body: bytes, headers: Any) -> str:
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

    sent = re.search(r"charset=[\"']?([\w.:-]+)", (headers and headers.get_header("Content-Type")) or "", re.IGNORECASE)
    told = map_encoding_to_html5(sent[1], fallback_utf8=False) if sent else None
    encoding = told or detect_encoding(body, from_html_meta=True) or "utf-8"
    return str(bytes_to_str(body, encoding, errors="replace", fallback_encodings=()))


def too_deep(html: bytes) -> bool:
    """Whether more than DEEPEST elements may lie in each other: their start tags without an end so far."""
    depth = 0
    for end, closed in _TAG.findall(html):
        depth = max(0, depth - 1) if end else depth + (not closed)
        if depth > DEEPEST:
            return True
    return False
