"""Tokenizers that somebody else made: accepted with the same ids everywhere, or refused by the name of the part."""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import TokenizerConfig
from pipeline.tokenizer import Encoder, find_engines, read_given, read_tokenizer, special_tokens_of
from pipeline.tokenizer.agreement import SEAMS
from pipeline.tokenizer.files import parse_ranks
from tests.evaluation.make import TEXTS
from tests.tokenizer.make import STYLES, added, make, publish, style, template, trained

X = TokenizerConfig(path="x")


def auto(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def texts_for(seed: int, words: list[str]) -> list[str]:
    pick = random.Random(seed)
    pieces = [
        *SEAMS[1:],
        *words * 8,
        *(text[:80] for texts in TEXTS.values() for text in texts),
        "\u1c89a\ua7ceb",
        "\U000323b0",
    ]
    return ["".join(pick.choices(pieces, k=4)) for _ in range(12)] + [f"a{word}b {word} {word}" for word in words]


def check(seed: int, folder: Path) -> bool:
    """True if the tokenizer of this seed was accepted."""
    made = make(seed)
    if made.refused:
        with pytest.raises(ValueError, match=re.escape(made.refused)):
            read_given(made.files, made.config)
        return False
    given = read_given(made.files, made.config)
    encoder = Encoder(given.files, find_engines(given.files).engines)
    publish(given.files, folder)
    published = auto(folder)
    texts = texts_for(seed, made.words)
    ids, offsets = encoder.encode([text.encode() for text in texts])
    ours = [ids[start:stop].tolist() for start, stop in zip(offsets, offsets[1:])]

    def theirs(tokenizer: Any) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    assert ours == theirs(published), f"seed {seed}, {encoder.engines}"
    assert (published.eos_token_id, len(published)) == (encoder.eos_id, encoder.vocab_size)
    for token, number in encoder.special_tokens.items():
        assert published(token, add_special_tokens=False)["input_ids"] == [number]
    again = folder / "again"
    published.save_pretrained(again)
    assert theirs(auto(again)) == ours
    back = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in {".json", ".jinja"}}
    second = read_tokenizer(back, made.config)  # a run that starts from what was published
    assert second["tokenizer.json"] == given.files["tokenizer.json"]
    if "tokenizer_config.json" in made.files:  # all that its author wrote is there
        settings = json.loads(made.files["tokenizer_config.json"])
        kept = json.loads(back["tokenizer_config.json"])
        assert {name: kept.get(name) for name in settings if name != "added_tokens_decoder"} == {
            name: value for name, value in settings.items() if name != "added_tokens_decoder"
        }
    return True


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_generated_tokenizers(first: int, tmp_path: Path) -> None:
    accepted = 0
    for seed in range(first, first + 10):
        (tmp_path / str(seed)).mkdir()
        accepted += check(seed, tmp_path / str(seed))
    assert accepted == 5


@pytest.mark.long
@pytest.mark.parametrize("first", range(0, 300, 20))
def test_three_hundred_generated_tokenizers(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + 20):
        (tmp_path / str(seed)).mkdir()
        assert check(seed, tmp_path / str(seed)) == (seed % 2 == 0)


# -- what stands in one file or the other ----------------------------------------------------------------------------


def folder_of(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_settings_survive(tmp_path: Path) -> None:
    """Chat templates, flags, padding side, end token: AutoTokenizer does the same with the given and the published folder."""
    document, names = style("llama3")
    settings = {
        "chat_template": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", "add_bos_token": True,
        "padding_side": "left", "bos_token": names[1], "eos_token": names[2], "pad_token": names[3],
        "additional_special_tokens": [names[2]], "clean_up_tokenization_spaces": True, "auto_map": {"AutoTokenizer": ["x.Y", None]},
    }  # fmt: skip
    files = {"tokenizer.json": json.dumps(document).encode(), "tokenizer_config.json": json.dumps(settings).encode()}
    local = {name: value for name, value in settings.items() if name != "auto_map"}
    given = auto(folder_of({**files, "tokenizer_config.json": json.dumps(local).encode()}, tmp_path / "given"))
    publish(read_tokenizer(files, X), folder_of({}, tmp_path / "published"))
    published = auto(tmp_path / "published")
    messages = [{"role": "user", "content": "Hi <|eot_id|>"}]
    for tokenizer in (given, published):
        assert tokenizer.apply_chat_template(messages, tokenize=False) == "<user>Hi <|eot_id|>"
    both = ["a", "a longer text"]
    assert published(both, padding=True)["input_ids"] == given(both, padding=True)["input_ids"]
    assert published(both, padding=True)["input_ids"][0][0] == given.pad_token_id
    assert (
        published("x")["input_ids"]
        == given("x")["input_ids"]
        == [given.bos_token_id, *published("x", add_special_tokens=False)["input_ids"]]
    )
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "padding_side", "clean_up_tokenization_spaces"):
        assert getattr(published, name) == getattr(given, name), name
    text = json.loads((tmp_path / "published" / "tokenizer_config.json").read_text())
    assert (text["add_bos_token"], text.get("auto_map")) == (True, None)


def test_templates_in_files_and_roles_in_the_map(tmp_path: Path) -> None:
    document, names = style("qwen")
    files = {
        "tokenizer.json": json.dumps(document).encode(),
        "tokenizer_config.json": b'{"tokenizer_class": "Qwen2Tokenizer"}',
        "special_tokens_map.json": json.dumps(
            {"eos_token": {"content": names[2], "lstrip": False}, "pad_token": names[0]}
        ).encode(),
        "chat_template.jinja": b"A{{ messages[0].content }}",
        "additional_chat_templates/tool.jinja": b"B{{ messages[0].content }}",
    }
    given = read_given(files, X)
    assert any("Qwen2Tokenizer" in note for note in given.notes)
    publish(given.files, folder_of({}, tmp_path / "published"))
    published = auto(tmp_path / "published")
    assert (published.eos_token, published.pad_token) == (names[2], names[0])
    messages = [{"role": "user", "content": "x"}]
    assert published.apply_chat_template(messages, tokenize=False) == "Ax"
    assert published.apply_chat_template(messages, chat_template="tool", tokenize=False) == "Bx"


def test_the_end_token() -> None:
    """The configuration's, else the tokenizer's own, else [EOS]; anything else is asked for."""
    document, names = style("llama3")
    alone = {"tokenizer.json": json.dumps(document).encode()}
    own = {**alone, "tokenizer_config.json": json.dumps({"eos_token": names[2]}).encode()}
    assert json.loads(read_tokenizer(own, X)["tokenizer_config.json"])["eos_token"] == names[2]
    chosen = TokenizerConfig(path="x", eos_token=names[0])
    assert json.loads(read_tokenizer(own, chosen)["tokenizer_config.json"])["eos_token"] == names[0]
    assert Encoder(read_tokenizer(own, chosen)).eos_id == 434
    with pytest.raises(ValueError, match=r"tokenizer\.eos_token: the tokenizer names none; say which"):
        read_tokenizer(alone, X)
    with pytest.raises(ValueError, match=r"tokenizer\.eos_token: '<end>' is not a special token"):
        read_tokenizer(own, TokenizerConfig(path="x", eos_token="<end>"))
    moonlight, _ = style("moonlight")
    assert Encoder(read_tokenizer({"tokenizer.json": json.dumps(moonlight).encode()}, X)).eos_id == 434


def test_an_end_token_that_text_produces_is_refused() -> None:
    document, _ = style("gpt2")
    document["added_tokens"] = [added("def", document["model"]["vocab"]["def"], True)]
    with pytest.raises(ValueError, match=r"the text 'def' in a document gives the EOS id"):
        read_tokenizer({"tokenizer.json": json.dumps(document).encode()}, TokenizerConfig(path="x", eos_token="def"))


def test_engines_differ_and_the_right_one_is_taken() -> None:
    """single_word is known to fastokens alone, NFKC and a class of digits to neither of the fast ones."""
    document, names = style("llama3")
    document["added_tokens"].append(added("<think>", 438))
    eos = TokenizerConfig(path="x", eos_token=names[0])

    def engines(**changes: Any) -> tuple[str, ...]:
        files = read_tokenizer({"tokenizer.json": json.dumps({**document, **changes}).encode()}, eos)
        return find_engines(files).engines

    assert engines() == ("gigatoken", "fastokens")
    alone = [*document["added_tokens"][:-1], added("<think>", 438, single_word=True)]
    assert engines(added_tokens=alone) == ("fastokens",)
    assert engines(normalizer={"type": "NFKC"}) == ("tokenizers",)
    found = find_engines(
        read_tokenizer({"tokenizer.json": json.dumps({**document, "normalizer": {"type": "NFKC"}}).encode()}, eos)
    )
    assert [reason.split()[0] for reason in found.reasons] == ["gigatoken", "fastokens"]


def test_a_rank_file_with_other_names(tmp_path: Path) -> None:
    """Moonshot's later models name other ids, in tokenizer_config.json; without one the names are Moonlight's."""
    ranks = trained()["tiktoken.model"]
    n = len(parse_ranks(ranks))
    described = {
        n: ("[BOS]", True), n + 1: ("[EOS]", True), n + 9: ("[EOT]", True), n + 11: ("<|tool_call_begin|>", False),
    }  # fmt: skip
    settings = {
        "added_tokens_decoder": {
            str(number): {"content": content, "special": special} for number, (content, special) in described.items()
        },
        "eos_token": "[EOS]", "tokenizer_class": "TikTokenTokenizer", "chat_template": "{{ messages }}",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    }  # fmt: skip
    files = read_tokenizer({"tiktoken.model": ranks, "tokenizer_config.json": json.dumps(settings).encode()}, X)
    special = special_tokens_of(files["tokenizer.json"])
    assert (special["[EOT]"], special["<|reserved_token_" + f"{n + 2}|>"], len(special)) == (n + 9, n + 2, 255)
    encoder = Encoder(files, find_engines(files).engines)
    assert encoder.engines == ("gigatoken", "fastokens")
    assert encoder.encode([b"a<|tool_call_begin|>[EOT]"])[0].tolist()[1] == n + 11
    assert files["tiktoken.model"] == ranks
    publish(files, folder_of({}, tmp_path / "published"))
    published = auto(tmp_path / "published")
    assert published("a<|tool_call_begin|>", add_special_tokens=False)["input_ids"][1] == n + 11
    assert published.chat_template == "{{ messages }}"
    far = {"added_tokens_decoder": {"9999": {"content": "x"}}}
    with pytest.raises(ValueError, match=r"added_tokens_decoder: id 9999 is not one of the 256"):
        read_tokenizer({"tiktoken.model": ranks, "tokenizer_config.json": json.dumps(far).encode()}, X)


def test_two_files_that_disagree_are_refused() -> None:
    document, _names = style("moonlight")
    document["model"]["merges"] = document["model"]["merges"][:-1]
    with pytest.raises(ValueError, match=r"tiktoken\.model and tokenizer\.json are two different tokenizers"):
        read_tokenizer(
            {"tiktoken.model": trained()["tiktoken.model"], "tokenizer.json": json.dumps(document).encode()}, X
        )
    files = {"tokenizer.json": json.dumps(style("gpt2")[0]).encode(), "added_tokens.json": b'{"<more>": 440}'}
    settings = {"tokenizer_config.json": b'{"eos_token": "<|endoftext|>"}'}
    with pytest.raises(ValueError, match=r"added_tokens\.json: '<more>' has id 440"):
        read_tokenizer(files | settings, X)
    settings = {"tokenizer_config.json": b'{"eos_token": "<|endoftext|>", "add_prefix_space": true}'}
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: add_prefix_space is True, but False"):
        read_tokenizer({"tokenizer.json": files["tokenizer.json"], **settings}, X)


def test_everything_of_moonlights_pattern_is_used() -> None:
    """A tokenizer.json with Moonlight's pattern is not only its ranks: what else it says is there afterwards."""
    document, names = style("moonlight")
    document["added_tokens"].append(added("<tool>", 440))
    document["post_processor"] = template([names[1]], [], {names[1]: 435})
    files = {"tokenizer.json": json.dumps(document).encode()}
    given = read_given(files, X)
    assert given.files["tokenizer.json"] == files["tokenizer.json"]
    assert any("puts [BOS] around a text" in note for note in given.notes)
    encoder = Encoder(given.files, find_engines(given.files).engines)
    assert encoder.engines == ("gigatoken", "fastokens")
    assert 440 in encoder.encode([b"x<tool>y"])[0]
    assert (
        hashlib.sha256(given.files["tiktoken.model"]).digest() == hashlib.sha256(trained()["tiktoken.model"]).digest()
    )
    document["normalizer"] = {"type": "NFC"}
    composed = {"tokenizer.json": json.dumps(document).encode()}
    found = read_tokenizer(composed, X)
    assert "tiktoken.model" not in found
    assert Encoder(found, find_engines(found).engines).engines == ("fastokens",)


def test_styles_of_the_field_run_on_the_fast_engine() -> None:
    for name in STYLES:
        document, names = style(name)
        files = read_tokenizer(
            {"tokenizer.json": json.dumps(document).encode()}, TokenizerConfig(path="x", eos_token=names[0])
        )
        assert find_engines(files).engines == ("gigatoken", "fastokens"), name
