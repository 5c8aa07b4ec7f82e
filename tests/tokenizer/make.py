"""Tokenizers as others make them: five styles, every optional part drawn by chance, faults that must be refused by name."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.config.schema import TokenizerConfig
from pipeline.publishing.export import tokenizer_files
from pipeline.tokenizer import train_tokenizer
from tests.evaluation.make import TEXTS, run_config

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
STYLES = ("moonlight", "gpt2", "llama3", "qwen", "neox")
SIZE = 600


@lru_cache(maxsize=1)
def trained() -> dict[str, bytes]:
    return train_tokenizer([text for texts in TEXTS.values() for text in texts] * 2, TokenizerConfig(vocab_size=SIZE))


def split(pattern: str) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [step, dict(BYTE_LEVEL)]}


def added(content: str, number: int, special: bool = False, **flags: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special, "special": special}
    return {"id": number, "content": content, **plain, **flags}


def template(before: list[str], after: list[str], ids: dict[str, int]) -> dict[str, Any]:
    def sequence(kind: int) -> dict[str, Any]:
        return {"Sequence": {"id": "AB"[kind], "type_id": kind}}

    def token(name: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": 0}}

    single = [*map(token, before), sequence(0), *map(token, after)]
    named = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in {*before, *after}}
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, sequence(1)], "special_tokens": named}


@dataclass
class Made:
    """A folder to give, and the part that must be named if it is to be refused."""

    files: dict[str, bytes]
    config: TokenizerConfig
    refused: str | None
    words: list[str] = field(default_factory=list)  # added tokens, for texts


def style(name: str) -> tuple[dict[str, Any], list[str]]:
    """tokenizer.json of a style with its special tokens, EOS first."""
    document = copy.deepcopy(json.loads(trained()["tokenizer.json"]))
    document["added_tokens"] = []
    n = len(document["model"]["vocab"])
    names = {
        "moonlight": ["[EOS]", "[BOS]", "<|im_end|>", "<|im_user|>", "[PAD]", "[UNK]"],
        "gpt2": ["<|endoftext|>"],
        "llama3": ["<|end_of_text|>", "<|begin_of_text|>", "<|eot_id|>", "<|reserved_special_token_0|>"],
        "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "neox": ["<|endoftext|>", "<|padding|>"],
    }[name]
    document["added_tokens"] = [added(token, n + place, True) for place, token in enumerate(names)]
    ids = {token["content"]: token["id"] for token in document["added_tokens"]}
    model = document["model"]
    if name == "gpt2":
        document["pre_tokenizer"] = BYTE_LEVEL | {"use_regex": True}
        document["post_processor"] = BYTE_LEVEL | {"use_regex": True}
        model["ignore_merges"] = False
        model["merges"] = [" ".join(pair) for pair in model["merges"]]  # the older way to write them
    elif name == "llama3":
        document["pre_tokenizer"] = split(CL100K)
        document["post_processor"] = {
            "type": "Sequence", "processors": [BYTE_LEVEL, template(["<|begin_of_text|>"], [], ids)],
        }  # fmt: skip
    elif name == "qwen":
        document["pre_tokenizer"] = split(CL100K.replace("{1,3}", ""))
        document["normalizer"] = {"type": "NFC"}
        model["ignore_merges"] = False
    elif name == "neox":
        document["pre_tokenizer"] = BYTE_LEVEL | {"use_regex": True}
        document["normalizer"] = {"type": "NFC"}
        model["ignore_merges"] = False
    return document, names


NORMALIZERS: tuple[Any, ...] = (
    {"type": "NFC"}, {"type": "NFKC"}, {"type": "NFD"}, {"type": "Lowercase"},
    {"type": "Replace", "pattern": {"String": "\u3000"}, "content": " "}, {"type": "Prepend", "prepend": " "},
    {"type": "Strip", "strip_left": True, "strip_right": False},
    {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}, {"type": "Lowercase"}]},
)  # fmt: skip


def make(seed: int) -> Made:
    """The tokenizer of a seed. Every second one has a fault."""
    pick = random.Random(seed)
    document, names = style(STYLES[seed % len(STYLES)])
    tokens = document["added_tokens"]
    free = max(token["id"] for token in tokens) + 1
    words = pick.sample(
        ["<think>", "</think>", "  ", "    ", "<tool_call>", "\n\n\n", "def", "étude", "漢字", "_x", "[INST]"],
        pick.randint(0, 5),
    )
    for place, word in enumerate(words):
        flags = {flag: pick.random() < 0.25 for flag in ("single_word", "normalized")}
        if place == 0:  # of one alone: the library fails where two such tokens meet
            flags |= {flag: pick.random() < 0.4 for flag in ("lstrip", "rstrip")}
        known = document["model"]["vocab"].get(word)
        tokens.append(added(word, free if known is None else known, **flags))
        free += known is None
    if pick.random() < 0.2:
        document["normalizer"] = pick.choice(NORMALIZERS)
    if pick.random() < 0.15:
        for step in (document["pre_tokenizer"], *document["pre_tokenizer"].get("pretokenizers", ())):
            if step["type"] == "ByteLevel":
                step["add_prefix_space"] = True
    if pick.random() < 0.1:
        document["pre_tokenizer"] = split(r"\d|[\p{L}_]+|\s+|[^\s\p{L}\d]+")  # nobody's pattern
    ids = {token["content"]: token["id"] for token in tokens}
    if pick.random() < 0.2:
        document["post_processor"] = template(pick.choice([[], [names[-1]]]), pick.choice([[], [names[0]]]), ids)
    if pick.random() < 0.15:
        document["truncation"] = {"direction": "Left", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    if pick.random() < 0.15:
        document["padding"] = {
            "strategy": {"Fixed": 40}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": ids[names[-1]],
            "pad_type_id": 0, "pad_token": names[-1],
        }  # fmt: skip
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": names[0]}
    if pick.random() < 0.5:
        settings |= {"chat_template": "{{ messages[0].content }}", "padding_side": "left", "add_bos_token": True}
    if pick.random() < 0.5:
        settings["bos_token"] = names[-1]
    if pick.random() < 0.3:
        settings["pad_token"] = {
            **{key: value for key, value in tokens[0].items() if key != "id"},
            "__type": "AddedToken",
        }
    if pick.random() < 0.5:
        settings["added_tokens_decoder"] = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in tokens
        }
    elif pick.random() < 0.3:
        settings["extra_special_tokens"] = names
    refused = break_it(pick, document, settings, names) if seed % 2 else None
    files = {"tokenizer.json": json.dumps(document).encode()}
    given_eos = None
    if pick.random() < 0.8 or (refused or "").startswith("tokenizer_config"):
        files["tokenizer_config.json"] = json.dumps(settings).encode()
    else:
        given_eos = names[0]
    return Made(files, TokenizerConfig(path="x", eos_token=given_eos), refused, words)


def break_it(pick: random.Random, document: dict[str, Any], settings: dict[str, Any], names: list[str]) -> str:
    """Put in a fault; the words that the refusal must hold."""
    model, tokens = document["model"], document["added_tokens"]
    fault = pick.choice(
        [
            "hole",
            "hole in the vocabulary",
            "dropout",
            "byte",
            "fallback",
            "kind",
            "removed",
            "template",
            "role",
            "flag",
            "prefix",
            "suffix",
        ]
    )
    if fault == "hole":
        tokens.append(added("<far>", max(token["id"] for token in tokens) + 7))
        settings.pop("added_tokens_decoder", None)
        return "added_tokens: '<far>' has id"
    if fault == "hole in the vocabulary":
        for token in [token for token in model["vocab"] if model["vocab"][token] > 500]:
            model["vocab"][token] += 9
        for token in tokens:
            token["id"] += 9
        settings.pop("added_tokens_decoder", None)
        document["post_processor"] = None
        return "added_tokens"
    if fault == "dropout":
        model["dropout"] = 0.1
        return "model.dropout"
    if fault == "byte":
        del model["vocab"]["Ā"]
        model["merges"] = [pair for pair in model["merges"] if "Ā" not in "".join(pair)]
        return "model.vocab: byte 0x00 has no token"
    if fault == "fallback":
        model["byte_fallback"] = True
        return "model.byte_fallback"
    if fault == "kind":
        document["model"] = {
            "type": "WordPiece",
            "vocab": model["vocab"],
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
        }
        return "model: 'WordPiece'"
    if fault == "removed":
        document["pre_tokenizer"] = (
            split(r"\s+") if document["pre_tokenizer"]["type"] == "ByteLevel" else document["pre_tokenizer"]
        )
        document["pre_tokenizer"]["pretokenizers"][0] = {
            "type": "Split",
            "pattern": {"Regex": r"\d+"},
            "behavior": "Removed",
            "invert": False,
        }
        document["normalizer"] = None
        document["added_tokens"] = [token | {"lstrip": False, "rstrip": False} for token in tokens]
        settings.pop("added_tokens_decoder", None)
        return "pre_tokenizer: text is lost"
    if fault == "template":
        ids = {token["content"]: token["id"] for token in tokens}
        document["post_processor"] = template([names[0]], [], ids | {names[0]: ids[names[0]] - 1})
        return "post_processor"
    if fault == "role":
        settings["unk_token"] = "<nowhere>"
        return "tokenizer_config.json: unk_token '<nowhere>'"
    if fault == "flag":
        token = {key: value for key, value in tokens[0].items() if key != "id"}
        settings["added_tokens_decoder"] = {str(tokens[0]["id"]): token | {"rstrip": True}}
        return "tokenizer_config.json: added_tokens_decoder"
    part = "continuing_subword_prefix" if fault == "prefix" else "end_of_word_suffix"
    model[part] = "##"
    return f"model.{part}"


def publish(files: dict[str, bytes], folder: Path) -> None:
    """The folder as publishing writes it, weights apart."""
    config = run_config(str(folder))
    (folder / "config.json").write_text(
        json.dumps({"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]})
    )
    for name, data in tokenizer_files(files, config).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
