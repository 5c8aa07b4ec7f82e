"""Text files: a document each."""

from __future__ import annotations

import gzip

import zstandard

from tests.data_prep.readers.common import outcome, read


def test_text_files() -> None:
    assert outcome(read("sub/a.md", "täxt".encode())) == [("sub/a.md", "täxt")]
    assert outcome(read("a.md", b"")) == [("a.md", "!empty_document")]
    assert outcome(read("a.md", b"caf\xe9")) == [("a.md", "!invalid_utf8")]
    assert outcome(read("a.md", b"x" * 1001)) == [("a.md", "!too_large")]
    for name, compress in (("a.md.gz", gzip.compress), ("a.md.zst", zstandard.ZstdCompressor().compress)):
        assert outcome(read(name, compress(b"x" * 1000))) == [(name, "x" * 1000)]
        assert outcome(read(name, compress(b"x" * 1001))) == [(name, "!too_large")]
        assert outcome(read(name, b"this is not compressed")) == [(name, "!corrupt_file")]
