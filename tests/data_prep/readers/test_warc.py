"""Web archives as warcio writes them: what is a document, what is filtered and why, whose bytes they are, and damage."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from data_prep import warc_versions
from data_prep.identity import settings_digest
from data_prep.plan import Slice, unit_settings
from data_prep.prepare import prepare
from data_prep.readers import ReaderSettings, Record, read_slice
from data_prep.readers.warc import DEEPEST, too_deep
from pipeline.config.conditions import parse
from pipeline.config.load import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.storage import open_storage

LIMIT = 100_000


def page(text: str) -> bytes:
    """The text in the middle of what every site has."""
    menu = "".join(f'<li><a href="/{i}">Menu {i}</a></li>' for i in range(20))
    return (
        f"<html><head><title>Site</title><script>var x = 1;</script></head><body><nav><ul>{menu}</ul></nav>"
        f"<main><article><h1>Heading</h1><p>{text}</p></article></main><footer>All rights reserved</footer></body></html>"
    ).encode()


class Archive:
    def __init__(self, compressed: bool = False) -> None:
        self.out = io.BytesIO()
        self.writer = WARCWriter(self.out, gzip=compressed)
        self.writer.write_record(self.writer.create_warcinfo_record("a.warc", {"software": "a test"}))

    def add(
        self, url: str, body: bytes, kind: str = "text/html; charset=utf-8", status: str = "200 OK", **headers: str
    ) -> Archive:
        sent = [("Content-Type", kind), *((name.replace("_", "-"), value) for name, value in headers.items())]
        head = StatusAndHeaders(status, sent, protocol="HTTP/1.1")
        record = self.writer.create_warc_record(url, "response", payload=io.BytesIO(body), http_headers=head)
        self.writer.write_record(record)
        return self

    def other(self, url: str, record_type: str, body: bytes, kind: str = "text/plain") -> Archive:
        payload = io.BytesIO(body)
        self.writer.write_record(
            self.writer.create_warc_record(url, record_type, payload=payload, warc_content_type=kind)
        )
        return self

    @property
    def bytes(self) -> bytes:
        return self.out.getvalue()


def read(data: bytes, path: str = "a.warc", **settings: object) -> list[Record]:
    reader = ReaderSettings(
        **{"format": "warc", "text_field": "text", "id_field": None, "max_document_bytes": LIMIT} | settings
    )  # type: ignore[arg-type]
    return list(read_slice(Slice(path, len(data), ""), io.BytesIO(data), reader))


def several(compressed: bool = False) -> bytes:
    made = Archive(compressed).add("http://a/1", page("The first page says this."))
    made.other("http://a/1", "request", b"GET / HTTP/1.1\r\n\r\n", "application/http; msgtype=request")
    made.add("http://a/2.png", b"\x89PNG\r\n", "image/png")
    made.add("http://a/3", page("Not here."), status="404 Not Found")
    made.add("http://a/4", page("The second page."), "application/xhtml+xml")
    made.add("http://a/5", b"<html><body><nav>Menu</nav></body></html>")
    made.add("http://a/6.txt", "plain, caf\xe9".encode("latin-1"), "text/plain; charset=iso-8859-1")
    made.add("http://a/7", page("Nobody can read this."), Content_Encoding="br")
    return made.other("http://a/8", "conversion", b"text that was extracted before").bytes


@pytest.mark.parametrize(
    ("path", "packed"),
    [
        ("a.warc", several),
        ("a.warc.gz", lambda: several(compressed=True)),  # a member a record, as crawlers write
        ("whole.warc.gz", lambda: gzip.compress(several())),
        ("a.warc.zst", lambda: zstandard.compress(several())),
    ],
)
def test_what_is_a_document(path: str, packed: Callable[[], bytes]) -> None:
    found = read(packed(), path)
    assert [(each.location, each.rejected or each.text.decode()) for each in found] == [
        (f"{path}#1", "Heading\n\nThe first page says this."),
        (f"{path}#3", "not_html"),
        (f"{path}#4", "http_status"),
        (f"{path}#5", "Heading\n\nThe second page."),
        (f"{path}#6", "no_main_content"),
        (f"{path}#7", "plain, café"),
        (f"{path}#8", "content_encoding"),
        (f"{path}#9", "text that was extracted before"),
    ]
    assert all(each.reason == "" and each.doc_id == each.location for each in found)


def test_fields_of_a_record() -> None:
    found = read(several(), id_field="url", where=(parse("status == 200"), parse('url != "http://a/4"')))
    kept = [each for each in found if not each.rejected]
    assert [each.doc_id for each in kept] == ["http://a/1", "http://a/6.txt"]
    assert [each.rejected for each in found][-1] == "status == 200"  # of what is no response it is null
    (wrong, *_) = read(several(), where=(parse("langage == 1"),))
    assert (wrong.reason, wrong.excerpt) == ("missing_filter_field", b"no langage")


@pytest.mark.parametrize(
    ("text", "body", "kind"),
    [
        ("café crème", lambda html: html.encode("latin-1"), "text/html; charset=ISO-8859-1"),
        ("café crème", lambda html: html.replace("<head>", "<head><meta charset=windows-1252>").encode("cp1252"), "text/html"),
        ("Привет, мир", lambda html: html.replace("<head>", "<head><meta charset=koi8-r>").encode("koi8-r"), "text/html"),
        ("日本語の文章です", lambda html: html.encode("shift-jis"), "text/html; charset=Shift_JIS"),
        ("中文网页的正文", lambda html: html.encode(), "text/html"),
        ("quoted, naïve", lambda html: html.encode(), 'text/html; charset="UTF-8"'),
    ],
)  # fmt: skip
def test_letters(text: str, body: Callable[[str], bytes], kind: str) -> None:
    (found,) = read(Archive().add("http://a", body(page(text).decode()), kind).bytes)
    assert found.text.decode() == f"Heading\n\n{text}"


def test_bytes_that_are_no_letters_are_seen() -> None:
    (found,) = read(Archive().add("http://a", page("before XX after").replace(b"XX", b"\xff\xfe")).bytes)
    assert found.text.decode() == "Heading\n\nbefore \ufffd\ufffd after"


@pytest.mark.parametrize("encoding", ["gzip", "chunked"])
def test_encodings_of_a_body(encoding: str) -> None:
    body = page("The text under the encoding.")
    sent = {"gzip": gzip.compress, "chunked": lambda b: b"%x\r\n%s\r\n0\r\n\r\n" % (len(b), b)}[encoding](body)  # fmt: skip
    header = {"Transfer_Encoding": encoding} if encoding == "chunked" else {"Content_Encoding": encoding}
    found = read(Archive().add("http://a", sent, **header).add("http://b", page("The next.")).bytes)
    assert [each.text.decode() for each in found] == [
        "Heading\n\nThe text under the encoding.",
        "Heading\n\nThe next.",
    ]


def test_large_and_deep_pages() -> None:
    bomb = gzip.compress(b"<p>" + b"a" * (50 * LIMIT))
    made = Archive().add("http://a", bomb, Content_Encoding="gzip").add("http://b", b"<div>" * (DEEPEST + 1) + b"text")
    large, deep, fine = read(made.add("http://c", page("fine")).bytes)
    assert (large.reason, len(large.excerpt)) == ("too_large", 200)
    assert (deep.reason, deep.rejected) == ("", "too_deep")
    assert fine.text.endswith(b"fine")
    assert not too_deep(b"<li>item<p>text<br>" * (2 * DEEPEST))  # their ends may be left out
    assert not too_deep(b"<div><b>x</b></div>" * (2 * DEEPEST))
    assert not too_deep(b"<div" * (2 * DEEPEST))


def test_damage() -> None:
    whole = several()
    second = whole.index(b"WARC/1.0", whole.index(b"The second page"))
    cut = read(whole[: second - 30])
    assert [each.reason for each in cut] == ["", "", "", "", "corrupt_file"]
    assert cut[-1].location == "a.warc#5"
    assert b"before the record does" in cut[-1].excerpt
    garbage = read(whole[:second] + b"nothing of a record\r\n\r\n" + whole[second:])
    assert [each.reason for each in garbage] == ["", "", "", "", "corrupt_file"]
    packed = bytearray(several(compressed=True))
    assert read(bytes(packed[:-200]), "a.warc.gz")[-1].reason == "corrupt_file"
    packed[len(packed) // 2] ^= 0xFF
    assert read(bytes(packed), "a.warc.gz")[-1].reason == "corrupt_file"
    assert [each.reason for each in read(b"this is no archive" * 20)] == ["corrupt_file"]


def test_a_dataset_of_it(
    tmp_path: Path, run_config: Callable[..., RunConfig], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "crawl"
    folder.mkdir()
    for part in range(2):
        made = Archive(compressed=True)
        for number, text in enumerate(texts[20 * part : 20 * part + 20]):
            body = text.replace("&", "&amp;").replace("<", "&lt;")
            made.add(f"http://{part}/{number}", page(body)).add(f"http://{part}/{number}.png", b"\x89PNG", "image/png")
        (folder / f"{part}.warc.gz").write_bytes(made.bytes)
    config = run_config(folder, source={"format": "warc"})
    dataset = prepare(config, open_storage(config.storage))
    (source,) = dataset.sources
    assert (source.counts.docs_in, source.counts.filtered) == (80, {"not_html": 40})
    assert source.counts.docs_out + source.counts.heldout == 40
    settings = unit_settings(config.corpus.sources[0], config.corpus, "t")
    assert settings["warc"] == warc_versions.versions()

    other = run_config(folder, source={"format": "warc"}, seed=5)
    other = other.model_copy(update={"storage": other.storage.model_copy(update={"root": str(tmp_path / "other")})})
    held = settings_digest(other)
    monkeypatch.setattr(warc_versions, "is_installed", lambda: False)
    with pytest.raises(
        ConfigError, match=r"corpus.sources\[0\].format: warc needs warcio and resiliparse; pip install"
    ):
        prepare(other, open_storage(other.storage))
    assert settings_digest(other) == held  # a run that holds its dataset goes on without
