"""What a name says, what first bytes say, and which files of a folder are documents."""

from __future__ import annotations

import bz2
import gzip
import lzma

import pyarrow as pa
import pytest
import zstandard

from data_prep.formats import MAGIC_BYTES, compression_of, documents_among, format_of


def test_names() -> None:
    names = {
        "json": ["a.jsonl", "a.json.gz", "b/C.JSONL.zst", "x.ndjson.bz2", "x.jsonlines.xz", "x.json.lz4"],
        "parquet": ["x.parquet", "x.snappy.parquet", "x.PQ"],
        "arrow": ["data-00000-of-00001.arrow", "x.feather"],
        "csv": ["x.csv", "x.csv.gz"],
        "tsv": ["x.tsv.zst", "x.tab"],
        "text": ["readme.md", "a.txt.gz", "a.rst"],
        None: [
            "METADATA",
            "_SUCCESS",
            "README.html",
            "a.parquet.gz",
            "a.parquet.crc",
            "a.zip",
            "a.gz",
            "model.safetensors",
        ],
    }
    for kind, group in names.items():
        assert {format_of(name, "auto") for name in group} == {kind}
    assert format_of("a.txt", "jsonl") == "jsonl"


@pytest.mark.parametrize(
    ("codec", "data"),
    [
        ("gzip", gzip.compress(b"x", mtime=0)),
        ("zstd", zstandard.compress(b"x")),
        ("bz2", bz2.compress(b"x")),
        ("xz", lzma.compress(b"x")),
        ("lz4", bytes(pa.Codec("lz4").compress(b"x", asbytes=True))),
    ],
)
def test_first_bytes_overrule_the_name(codec: str, data: bytes) -> None:
    assert compression_of("a.jsonl.gz", data[:MAGIC_BYTES]) == codec
    assert compression_of("a.jsonl", data[:MAGIC_BYTES]) == codec
    assert compression_of("a.jsonl", b"{") is None
    assert compression_of("a.jsonl.xz", b"{") == "xz"


def test_files_beside_data_are_left_out_by_name_and_count() -> None:
    data = ["a.jsonl", "sub/b.parquet"]
    others = ["README.html", "_SUCCESS", "sub/_delta_log/0.json", "_metadata"]
    chosen, left_out = documents_among([*others, *data, "README.md"], "auto")
    assert chosen.tolist() == [False] * 4 + [True] * 2 + [False]
    assert str(left_out) == (
        "5 files left out (4 of no format known by name, 1 text files beside data files): "
        "README.html, README.md, _SUCCESS, _metadata, sub/_delta_log/0.json"
    )
    assert documents_among(["a.md", "b.txt", "_SUCCESS"], "auto")[0].tolist() == [True, True, False]
    chosen, left_out = documents_among([*others, *data], "text")
    assert (chosen.all(), left_out) == (True, documents_among([], "auto")[1])
    many = [f"{number:03d}.bin" for number in range(100)]
    assert str(documents_among(many, "auto")[1]).endswith("000.bin, 001.bin, 002.bin, 003.bin, 004.bin, ...")
