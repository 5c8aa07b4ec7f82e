"""JSON Lines: every document, and every bad record named with its place."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.plan import Slice
from data_prep.readers import ReaderSettings, compression, read_slice
from tests.data_prep.readers.common import SETTINGS, outcome, read

JSON_LINES = [
    (b'{"text": "plain", "id": "doc-1"}', "plain"),
    ('{"text": "ünïcode 漢字 \\ud83d\\ude00"}'.encode(), "ünïcode 漢字 😀"),
    (b'{"text": "not closed', "!invalid_json"),
    (b'{"text": NaN}', "!invalid_json"),
    (b'{"text": "\xff\xfe"}', "!invalid_utf8"),
    (b'{"text": "\\ud800 alone"}', "!lone_surrogates"),
    (b'{"body": "wrong name"}', "!missing_field"),
    (b'{"text": null}', "!null_field"),
    (b'["text"]', "!missing_field"),
    (b'{"text": 17}', "!non_string_field"),
    (b'{"text": ["a"]}', "!non_string_field"),
    (b'{"text": ""}', "!empty_document"),
    (b'{"text": "' + b"x" * 1000 + b'"}', "!too_large"),
    (b'{"text": "last\\nline", "id": 5}', "last\nline"),
]


def located(name: str) -> tuple[bytes, list[tuple[str, str]]]:
    data, expected = b"", []
    for line, result in JSON_LINES:
        expected.append((f"{name}@{len(data)}", result))
        data += line + b"\n"
    return data, expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.zst"])
def test_json_lines(name: str) -> None:
    data, expected = located(name)
    compress = {"z": gzip.compress, "t": zstandard.ZstdCompressor().compress, "l": bytes}[name[-1]]
    records = read(name, compress(data))
    assert outcome(records) == expected
    assert [records[0].doc_id, records[-1].doc_id, records[1].doc_id] == ["doc-1", "5", records[1].location]
    assert outcome(read(name, compress(data.rstrip(b"\n")))) == expected  # without a newline at the end
    blank = b"\n  \n" + data.replace(b"\n", b"\r\n")
    assert [text for _, text in outcome(read(name, compress(blank)))] == [text for _, text in expected]


@pytest.mark.parametrize(
    ("name", "compress"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.ZstdCompressor().compress)]
)
def test_several_frames_are_one_file(name: str, compress: object) -> None:
    data, expected = located(name)
    assert outcome(read(name, compress(data[:300]) + compress(data[300:]))) == expected


@pytest.mark.parametrize(
    ("name", "compress"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.ZstdCompressor().compress)]
)
def test_a_damaged_file_is_one_record_and_the_rest_survives(
    name: str, compress: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    import random

    monkeypatch.setattr(compression, "READ_BYTES", 1000)
    rng = random.Random(0)
    lines = [json.dumps({"text": str(rng.getrandbits(800))}).encode() + b"\n" for _ in range(3000)]
    whole = compress(b"".join(lines))
    cut = read(name, whole[: len(whole) // 2])
    assert [record.reason for record in cut if record.reason] == ["corrupt_file"]
    assert cut[-1].reason == "corrupt_file"
    flipped = bytearray(whole)
    flipped[len(whole) * 3 // 4] ^= 0xFF
    flipped[len(whole) * 3 // 4 + 1] ^= 0xFF
    damaged = read(name, bytes(flipped))
    assert damaged[-1].reason == "corrupt_file"
    good = [record.text for record in cut[:-1]]
    assert good == [json.loads(line)["text"].encode() for line in lines[: len(good)]]
    assert len(good) > 500
    assert [record.reason for record in read(name, b"this is not compressed")] == ["corrupt_file"]


@settings(derandomize=True, max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 60), max_size=30),
    st.lists(st.integers(0, 2000), max_size=4),
    st.integers(1, 50),
    st.booleans(),
)
def test_byte_ranges_share_no_line_and_lose_none(sizes: list[int], cuts: list[int], chunk: int, newline: bool) -> None:
    """Any cut of a file into byte ranges, read in chunks of any size, gives its lines once."""
    lines = [json.dumps({"text": f"{index}-" + "x" * size}).encode() for index, size in enumerate(sizes)]
    data = b"\n".join(lines) + (b"\n" if newline else b"")
    edges = [0, *sorted({cut for cut in cuts if cut < len(data)} - {0}), len(data)]
    before = compression.READ_BYTES
    compression.READ_BYTES = chunk
    try:
        whole = outcome(read("a.jsonl", data))
        parts = [outcome(read("a.jsonl", data, SETTINGS, start, stop)) for start, stop in zip(edges, edges[1:])]
    finally:
        compression.READ_BYTES = before
    assert [text for _, text in whole] == [json.loads(line)["text"] for line in lines]
    assert [record for part in parts for record in part] == whole


def test_fields_are_configurable() -> None:
    configured = ReaderSettings("jsonl", "content", "url", 1000)
    (record,) = read("any.txt", b'{"content": "abc", "url": "http://x"}', configured)
    assert (record.text, record.doc_id) == (b"abc", "http://x")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), ConnectionResetError("reset"), TimeoutError()], ids=repr
)
def test_a_failing_storage_is_not_a_bad_record(name: str, error: OSError) -> None:
    class Failing(io.RawIOBase):
        def readinto(self, buffer: object) -> int:
            raise error

        def readable(self) -> bool:
            return True

        def seekable(self) -> bool:
            return True

        def seek(self, offset: int, whence: int = 0) -> int:
            return 1000

        def tell(self) -> int:
            return 1000

    with pytest.raises(type(error)):
        list(read_slice(Slice(name, 1000, ""), Failing(), SETTINGS))


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.csv"])
def test_a_two_gigabyte_document_needs_little_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    openers = {
        "z": lambda: gzip.GzipFile(path, "wb", compresslevel=1),
        "t": lambda: zstandard.ZstdCompressor().stream_writer(path.open("wb")),
    }
    begin, end = {
        "a.json": (b'[{"text": "first"}, {"text": "', b'"}, {"text": "last"}]'),
        "a.csv": (b'text\nfirst\n"', b'"\nlast\n'),
    }.get(name, (b'{"text": "first"}\n{"text": "', b'"}\n{"text": "last"}\n'))
    with openers.get(name[-1], lambda: path.open("wb"))() as file:
        file.write(begin)
        for _ in range(2048):
            file.write((b"x" * 1023 + b"," if name == "a.csv" else b"x" * 1024) * 1024)
        file.write(end)
    program = (
        "import sys\nfrom data_prep.plan import Slice\nfrom data_prep.readers import *\n"
        "path = sys.argv[1]\n"
        f"part = Slice('{name}', 1, '')\n"
        "found = [r.reason or r.text.decode() for r in read_slice(part, open(path, 'rb'), ReaderSettings('auto', 'text', None, 64 << 20))]\n"
        "assert found == ['first', 'too_large', 'last'], found\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, check=True, cwd=Path(__file__).parents[3]
    )
    assert int(done.stdout) * 1024 < 400 << 20
