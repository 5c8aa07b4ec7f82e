"""Letters that not every Unicode table has: the ids are the published tokenizer's, and no unit fails."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.prepare import prepare
from pipeline.config.load import load_config
from pipeline.config.schema import TokenizerConfig
from pipeline.file_index import open_index
from pipeline.storage import open_storage
from pipeline.tokenizer import Encoder, find_engines, read_tokenizer
from pipeline.tokenizer.engines import engine
from pipeline.tokenizer.files import build_files, default_settings, special_token
from pipeline.tokenizer.newer_letters import RANGES, holds_newer_letters
from tests.tokenizer.make import CL100K, publish, split

NEWER = {point for low, high in RANGES for point in range(low, high + 1)}
EVERYTHING = [point for point in [*range(0x80, 0x40000), *range(0xE0000, 0xE0200)] if not 0xD800 <= point < 0xE000]


def letters_of_late() -> list[str]:
    """Letters and marks of Unicode 17 that Python's table does not have yet: all of Unicode 16 and 17, on Python 3.11 of 15, too."""
    found = regex.findall(r"[\p{L}\p{M}\p{N}]", "".join(map(chr, EVERYTHING)))
    return [letter for letter in found if unicodedata.category(letter) == "Cn"]


def revealing(pattern: str | None = None, **parts: Any) -> dict[str, bytes]:
    """A tokenizer whose ids show where text was split: it merges the last byte of a character with what follows it."""
    lead, rest = [bytes([byte]) for byte in range(0xC2, 0xF5)], [bytes([byte]) for byte in range(0x80, 0xC0)]
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [left + byte for left in (b"a", b"A", b" ", b"1", b"'", b"\n", b".") for byte in lead]
    tokens += [byte + right for byte in rest for right in (b"b", b"B", b"1", b"\n", b" ", b".", b"'", *lead)]
    special = [special_token(name, len(tokens) + place) for place, name in enumerate(("[BOS]", "[EOS]"))]
    files = build_files(
        {token: rank for rank, token in enumerate(tokens)}, special, default_settings(["[EOS]"], "[EOS]")
    )
    if pattern is None and not parts:
        return files
    document = json.loads(files["tokenizer.json"]) | ({"pre_tokenizer": split(pattern)} if pattern else {}) | parts
    given = {"tokenizer.json": json.dumps(document).encode(), "tokenizer_config.json": files["tokenizer_config.json"]}
    return read_tokenizer(given, TokenizerConfig(path="x"))


TOKENIZERS = {
    "moonlight": revealing,
    "llama3": lambda: revealing(CL100K),
    "qwen": lambda: revealing(CL100K.replace("{1,3}", ""), normalizer={"type": "NFC"}),
}


def probe(point: int) -> str:
    x = chr(point)
    return f"a{x}b A{x}B 1{x}1 {x}. '{x} \n{x}\n  {x}{x}{x} .{x}' 漢{x}漢 a{x}\u0334\u0301b e\u0301{x}\u0307 \u1100{x}"


@settings(derandomize=True, max_examples=80, deadline=None)
@given(
    st.lists(
        st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from([chr(p) for pair in RANGES for p in pair])))
    )
)
def test_they_are_found(texts: list[str]) -> None:
    found = holds_newer_letters([text.encode() for text in texts])
    assert found.tolist() == [any(ord(character) in NEWER for character in text) for text in texts]


@pytest.mark.parametrize("newer_bytes", [0, 1 << 30], ids=["second engine", "reference"])
def test_lines_encoded_apart_have_the_ids_of_their_document(newer_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is around a line end, and whatever Unicode calls a space."""
    monkeypatch.setattr("pipeline.tokenizer.encoder.NEWER_BYTES", newer_bytes)
    files = revealing()
    encoder, reference = Encoder(files, ("gigatoken", "fastokens")), engine("tokenizers", files)
    pick = random.Random(5)
    around = [
        "\n",
        "\n",
        "\r",
        "\r\n",
        " ",
        "\t",
        "a",
        "B",
        "12",
        ".",
        "-",
        "'s",
        "é",
        "漢",
        "\u0301",
        "\u00a0",
        "\u2028",
        "\x85",
        "\x0b",
        "[EOS]",
    ]
    letters = [chr(point) for pair in RANGES for point in pair]
    documents = ["".join(pick.choices(around + letters[::9], k=pick.randint(1, 40))).encode() for _ in range(3000)]
    assert sum(b"\n" in document for document in documents) > 1000
    ids, offsets = encoder.encode(documents)
    expected, edges = reference.encode(documents)
    assert offsets.tolist() == edges.tolist()
    assert (ids == expected).all()


def differences(name: str, files: dict[str, bytes], points: Sequence[int]) -> list[int]:
    """Characters around which gigatoken or fastokens split or compose otherwise than the reference."""
    documents = [probe(point).encode() for point in points]
    expected, edges = engine("tokenizers", files).encode(documents)
    ids, offsets = engine(name, files).encode(documents)
    if offsets.tolist() == edges.tolist() and (ids == expected).all():
        return []
    return [
        point
        for point, a, b, c, d in zip(points, edges, edges[1:], offsets, offsets[1:])
        if expected[a:b].tolist() != ids[c:d].tolist()
    ]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_only_they_are_split_otherwise(name: str) -> None:
    """A sample of characters and all near RANGES; every character in the long test."""
    near = {point + step for pair in RANGES for point in pair for step in range(-3, 4)}
    points = sorted((near | set(EVERYTHING[::200])) & set(EVERYTHING))
    files = TOKENIZERS[name]()
    assert set(differences("gigatoken", files, points)) <= NEWER
    assert differences("fastokens", files, points) == []
    assert 0x10940 in differences("gigatoken", files, [0x10940])  # the reason for all this


@pytest.mark.long
@pytest.mark.parametrize("name", TOKENIZERS)
def test_of_all_characters_only_they_are_split_otherwise(name: str) -> None:
    files = TOKENIZERS[name]()
    assert set(differences("gigatoken", files, EVERYTHING)) <= NEWER
    assert differences("fastokens", files, EVERYTHING) == []


def texts_with_letters(count: int) -> list[str]:
    """Every new letter comes first, last, alone, doubled, and between letters, digits, spaces and punctuation."""
    pick = random.Random(17)
    letters = letters_of_late()
    assert len(letters) > 4000
    neighbours = [
        "a",
        "B",
        "1",
        " ",
        "  ",
        "\n",
        ".",
        "'",
        "漢",
        "é",
        "e\u0301",
        "\u0334",
        "word ",
        " word",
        "'s",
        "123",
        "",
    ]
    texts = []
    while len(texts) < count:
        letter = letters[len(texts) % len(letters)]
        parts = [
            pick.choice(neighbours),
            letter * pick.randint(1, 2),
            pick.choice(neighbours),
            pick.choice(letters),
            pick.choice(neighbours),
        ]
        pick.shuffle(parts)
        texts.append("".join(parts) + f" {len(texts)}")
    return texts


@pytest.mark.parametrize("name", TOKENIZERS)
def test_twenty_thousand_texts(name: str, tmp_path: Path) -> None:
    """Through prepare: no unit fails, and every document has the ids that AutoTokenizer gives on the published folder."""
    from transformers import AutoTokenizer

    texts = texts_with_letters(20_000 if name == "moonlight" else 2_000)
    (tmp_path / "corpus").mkdir()
    for part in range(4):
        lines = (json.dumps({"text": text, "id": str(place)}) for place, text in enumerate(texts) if place % 4 == part)
        (tmp_path / "corpus" / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    files = TOKENIZERS[name]()
    (tmp_path / "given").mkdir()
    for file, data in files.items():
        (tmp_path / "given" / file).write_bytes(data)
    corpus = {"sources": [{"name": "late", "path": str(tmp_path / "corpus"), "id_field": "id"}], "unit_bytes": 400_000}
    changes = {
        "storage.root": str(tmp_path / "root"), "corpus": json.dumps(corpus), "model.vocab_size": 9000,
        "tokenizer": json.dumps({"path": str(tmp_path / "given")}), "data.rows_per_group": 4,
    }  # fmt: skip
    config = load_config("debug", [f"{key}={value}" for key, value in changes.items()])
    storage = open_storage(config.storage)
    dataset = prepare(config, storage)
    source = dataset.sources[0]
    assert dataset.tokenizer.engines == ("gigatoken", "fastokens")
    assert (source.failed_units, source.counts.quarantined, source.counts.docs_in) == ((), {}, len(texts))
    publish(files, tmp_path)
    published = AutoTokenizer.from_pretrained(tmp_path)
    expected = published(texts, add_special_tokens=False)["input_ids"]
    tokens = {}
    for entry in open_index(storage, dataset).documents[0]:
        table = pq.read_table(Path(storage.root) / entry.path, columns=["tokens", "doc_id"])
        for doc_id, ids in zip(table["doc_id"].to_pylist(), table["tokens"].to_pylist()):
            tokens[int(doc_id)] = ids
    assert len(tokens) == len(texts)
    assert all(list(memoryview(tokens[place]).cast("H")) == ids for place, ids in enumerate(expected))


def test_without_a_second_engine_the_reference_takes_them() -> None:
    files = revealing()
    text = "a\U00010940b 漢\u088f".encode()
    plain = Encoder(files, ("gigatoken",))
    assert plain.encode([text])[0].tolist() != plain.check(text).tolist()
    for engines in (("gigatoken", "fastokens"), ("gigatoken", "tokenizers"), ("tokenizers",)):
        encoder = Encoder(files, engines)
        ids, offsets = encoder.encode([b"first", text, b"", b"last \xf0\x9f\x98\x80"])
        assert ids[offsets[1] : offsets[2]].tolist() == plain.check(text).tolist()
        assert encoder.decode(ids).encode() == b"first" + text + b"last \xf0\x9f\x98\x80"
    assert find_engines(files).engines == ("gigatoken", "fastokens")


def test_a_document_too_large_for_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tokenizer.encoder.REFERENCE_DOCUMENT_BYTES", 10)
    files = revealing()
    late = "\U00010940".encode()
    takes = {
        engines: [Encoder(files, engines).takes(text) for text in (b"short", b"a longer text", b"a longer text" + late)]
        for engines in (("gigatoken", "fastokens"), ("gigatoken", "tokenizers"), ("tokenizers",))
    }
    assert list(takes.values()) == [[True, True, True], [True, True, False], [True, False, False]]
