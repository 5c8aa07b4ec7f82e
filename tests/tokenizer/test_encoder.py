"""The tokenizer against Hugging Face `tokenizers`, `transformers` and tiktoken on real text."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from pipeline.config.schema import TokenizerConfig
from pipeline.tokenizer import Encoder, find_engines, read_tokenizer, train_tokenizer
from pipeline.tokenizer.files import format_ranks, moonshot_special_tokens, parse_ranks
from pipeline.tokenizer.pattern import SPLIT_PATTERN, byte_alphabet, to_bytes, to_characters

STDLIB = Path(sysconfig.get_paths()["stdlib"])
CONFIG = TokenizerConfig(vocab_size=2000)
MOONSHOT = TokenizerConfig(
    path="tiktoken.model",
    special_tokens=(
        "[BOS]",
        "[EOS]",
        "<|im_end|>",
        "<|im_user|>",
        "<|im_assistant|>",
        "<|im_system|>",
        "<|im_middle|>",
        "[PAD]",
        "[UNK]",
    ),
)
ODD_TEXTS = [
    "",
    " ",
    "\n\n\r\n \t\n",
    "don't DON'T we'LL  x's",
    "12345678 ١٢٣٤٥ 3.14",
    "漢字とかな混じり文 mixed 中文text中文",
    "naïve façade Ünïcödé Straße",
    "👩‍👩‍👧‍👦🏳️‍🌈 emoji",
    "\x00\x01 nul",
    "a" * 3000,
    " " * 3000,
    "=" * 200 + "\n" * 50,
    "text with [EOS] and [BOS] and [PAD] in it",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    paths = sorted(path for path in STDLIB.glob("*.py") if path.stat().st_size < 60_000)
    return [path.read_text() for path in paths]


@pytest.fixture(scope="module")
def files(texts: list[str]) -> dict[str, bytes]:
    return train_tokenizer(texts[:80], CONFIG)


@pytest.fixture(scope="module")
def encoder(files: dict[str, bytes]) -> Encoder:
    engines = find_engines(files).engines
    assert engines == ("gigatoken", "fastokens")
    return Encoder(files, engines)


def tiktoken_of(files: dict[str, bytes]) -> tiktoken.Encoding:
    ranks = parse_ranks(files["tiktoken.model"])
    return tiktoken.Encoding("test", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})


def ids_of(encoder: Encoder, text: str) -> list[int]:
    return encoder.encode([text.encode()])[0].tolist()


def test_ids_equal_hugging_face_and_tiktoken(texts: list[str], files: dict[str, bytes], encoder: Encoder) -> None:
    ids, offsets = encoder.encode([text.encode() for text in texts])
    assert (ids.dtype, offsets.dtype, len(offsets)) == (np.uint32, np.int64, len(texts) + 1)
    oracle = Tokenizer.from_str(files["tokenizer.json"].decode())
    other = tiktoken_of(files)
    encodings = oracle.encode_batch(texts, add_special_tokens=False)
    for index, text in enumerate(texts):
        ours = ids[offsets[index] : offsets[index + 1]].tolist()
        assert ours == encodings[index].ids
        assert ours == other.encode_ordinary(text)
        assert encoder.decode(ours) == text


@pytest.mark.parametrize("text", ODD_TEXTS, ids=range(len(ODD_TEXTS)))
def test_odd_texts(text: str, files: dict[str, bytes], encoder: Encoder) -> None:
    other = tiktoken_of(files)
    ours = ids_of(encoder, text)
    assert ours == other.encode_ordinary(text)
    assert ours == encoder.check(text.encode()).tolist()
    assert encoder.decode(ours) == text


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.text(max_size=200))
def test_any_text(files: dict[str, bytes], encoder: Encoder, text: str) -> None:
    ours = ids_of(encoder, text)
    assert ours == tiktoken_of(files).encode_ordinary(text)
    assert encoder.decode(ours) == text


def test_special_tokens_in_text_stay_text(encoder: Encoder) -> None:
    special = set(encoder.special_tokens.values())
    assert special == {1996, 1997, 1998, 1999}
    assert (encoder.eos_id, encoder.vocab_size) == (1997, 2000)
    ids = ids_of(encoder, "before [EOS] after")
    assert not special & set(ids)
    assert encoder.decode([*ids, encoder.eos_id]) == "before [EOS] after[EOS]"


def test_auto_tokenizer_gives_the_same_ids(
    texts: list[str], files: dict[str, bytes], encoder: Encoder, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    published = AutoTokenizer.from_pretrained(tmp_path)
    assert (published.eos_token_id, published.bos_token, published.pad_token) == (encoder.eos_id, "[BOS]", "[PAD]")
    assert len(published) == 2000
    for text in [*texts[::10], *ODD_TEXTS[:-1]]:
        assert published(text, add_special_tokens=False)["input_ids"] == ids_of(encoder, text)
        assert published.decode(ids_of(encoder, text)) == text
    assert published("[EOS]")["input_ids"] == [encoder.eos_id]
    assert Encoder.load(tmp_path).encode([b"some text"])[0].tolist() == ids_of(encoder, "some text")


def test_training_does_not_depend_on_threads_or_hash_seeds(texts: list[str], files: dict[str, bytes]) -> None:
    program = (
        "import sys, json, hashlib\nfrom pipeline.tokenizer import train_tokenizer\n"
        "from pipeline.config.schema import TokenizerConfig\n"
        "files = train_tokenizer(json.load(sys.stdin), TokenizerConfig(vocab_size=2000))\n"
        "print(json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in files.items()}))"
    )
    expected = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    root = Path(__file__).parents[2]
    for seed, threads in [("1", "1"), ("2", "4")]:
        environment = {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads, "PYTHONPATH": str(root)}
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps(texts[:80]).encode(),
            env=environment,
            capture_output=True,
            check=True,
        )
        assert json.loads(done.stdout) == expected


def test_moonshots_special_ids() -> None:
    """The ids of Moonlight's published tokenizer."""
    special = moonshot_special_tokens(163_584)
    assert len(special) == 256
    assert {name: token_id for name, token_id in special.items() if "reserved" not in name} == {
        "[BOS]": 163584, "[EOS]": 163585, "<|im_end|>": 163586, "<|im_user|>": 163587, "<|im_assistant|>": 163588,
        "<|im_system|>": 163594, "<|im_middle|>": 163601, "[PAD]": 163838, "[UNK]": 163839,
    }  # fmt: skip
    assert special["<|reserved_token_163600|>"] == 163600


def test_loading_a_rank_file(files: dict[str, bytes], encoder: Encoder, texts: list[str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    loaded = read_tokenizer({"tiktoken.model": files["tiktoken.model"]}, MOONSHOT)
    theirs = Encoder(loaded)
    assert (theirs.eos_id, theirs.vocab_size) == (1997, 1996 + 256)
    assert ids_of(theirs, texts[0]) == ids_of(encoder, texts[0])
    for name, data in loaded.items():
        (tmp_path / name).write_bytes(data)
    published = AutoTokenizer.from_pretrained(tmp_path)
    assert published(texts[0])["input_ids"] == ids_of(theirs, texts[0])
    chat = published.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == (
        "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>"
        "<|im_user|>user<|im_middle|>Hi<|im_end|><|im_assistant|>assistant<|im_middle|>"
    )


def test_loading_a_tokenizer_json(files: dict[str, bytes]) -> None:
    """Ours comes back byte for byte; one with another split pattern runs under its own."""
    assert read_tokenizer({"tokenizer.json": files["tokenizer.json"]}, CONFIG) == files
    document = json.loads(files["tokenizer.json"])
    document["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    gpt2 = json.dumps(document).encode()
    loaded = Encoder(read_tokenizer({"tokenizer.json": gpt2}, CONFIG))
    text = "def f(x): return 12345 # don't"
    assert ids_of(loaded, text) == Tokenizer.from_str(gpt2.decode()).encode(text).ids
    assert "tiktoken.model" not in read_tokenizer({"tokenizer.json": gpt2}, CONFIG)


def test_mistakes_are_named(files: dict[str, bytes]) -> None:
    ranks = parse_ranks(files["tiktoken.model"])
    assert format_ranks(ranks) == files["tiktoken.model"]
    with pytest.raises(ValueError, match="line 1 is not 'base64-token rank'"):
        parse_ranks(b"not a rank file\n")
    with pytest.raises(ValueError, match=r"ranks must be 0\.\.254"):
        parse_ranks(b"\n".join(files["tiktoken.model"].split(b"\n")[1:256]))
    with pytest.raises(ValueError, match="byte 0x00 is not a token"):
        parse_ranks(format_ranks({bytes([byte]): byte - 1 for byte in range(1, 256)}))
    with pytest.raises(ValueError, match="'<think>' is not a special token"):
        read_tokenizer(files, TokenizerConfig(path="x", special_tokens=("[EOS]", "<think>")))
    with pytest.raises(ValueError, match=r"no tiktoken\.model and no tokenizer\.json"):
        read_tokenizer({}, CONFIG)
    with pytest.raises(ValueError, match="no text to train on"):
        train_tokenizer([], CONFIG)


def test_byte_alphabet_is_hugging_faces() -> None:
    theirs = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    for character in map(chr, [*range(0x800), *range(0x800, 0xD800, 0x333), *range(0x10000, 0x110000, 0x3333)]):
        assert theirs.pre_tokenize_str(character)[0][0] == to_characters(character.encode())
    assert to_bytes(to_characters(bytes(range(256)))) == bytes(range(256))


def test_the_engine_is_recycled(files: dict[str, bytes], texts: list[str]) -> None:
    encoder = Encoder(files, ("gigatoken",), growth_limit_bytes=0)
    before = ids_of(encoder, texts[0])
    assert encoder.recycle()
    assert ids_of(encoder, texts[0]) == before
    assert not Encoder(files, ("gigatoken",), growth_limit_bytes=1 << 40).recycle()
