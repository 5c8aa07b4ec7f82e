"""The files of a tokenizer: rank file in, Hugging Face files out.

`tiktoken.model` holds `base64(token) rank` lines. BPE over ranks merges, in a piece of text, the adjacent pair whose
concatenation has the lowest rank, leftmost first, and takes a piece that is itself a token whole. The `tokenizer.json`
written here says the same in Hugging Face's terms: every split of a token into two tokens is a merge, merges ordered by
the rank of their result, `ignore_merges` on. So `AutoTokenizer` gives the same ids (but for special tokens, which it
recognises in text and the encoder does not).

Special tokens come after the ranks. A trained tokenizer has exactly the configured ones; a rank file that is loaded has
Moonshot's 256: those that its tokenizer_config.json names or else Moonlight's, unused ids named `<|reserved_token_{id}|>`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Collection
from typing import Any

import orjson

from pipeline.integrity import DamagedFile, read_checked
from pipeline.manifest import TokenizerManifest
from pipeline.storage import Storage
from pipeline.tokenizer.pattern import SPLIT_PATTERN, to_bytes, to_characters

RANK_FILE = "tiktoken.model"
TOKENIZER_JSON = "tokenizer.json"
CONFIG_JSON = "tokenizer_config.json"
TOKENIZER_CLASS = "PreTrainedTokenizerFast"  # reads tokenizer.json whole; the classes of models rebuild parts of it
MOONSHOT_RESERVED = 256
MOONSHOT_OFFSETS = {
    "[BOS]": 0,
    "[EOS]": 1,
    "<|im_end|>": 2,
    "<|im_user|>": 3,
    "<|im_assistant|>": 4,
    "<|im_system|>": 10,
    "<|im_middle|>": 17,
    "[PAD]": 254,
    "[UNK]": 255,
}
_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if loop.first and message['role'] != 'system' -%}"
    "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>"
    "{%- endif -%}"
    "<|im_{{ message['role'] }}|>{{ message['role'] }}<|im_middle|>{{ message['content'] }}<|im_end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"
)

Ranks = dict[bytes, int]


def parse_ranks(data: bytes) -> Ranks:
    """Tokens and their ranks. Raises ValueError for anything but a complete byte-level rank file."""
    ranks: Ranks = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line:
            continue
        token, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (binascii.Error, ValueError):
            raise ValueError(f"{RANK_FILE}: line {number} is not 'base64-token rank': {line[:60]!r}") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{RANK_FILE}: ranks must be 0..{len(ranks) - 1}, each once")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"{RANK_FILE}: byte {missing[0]:#04x} is not a token; a byte-level vocabulary needs all 256")
    return ranks


def format_ranks(ranks: Ranks) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in _by_id(ranks))


def moonshot_special_tokens(n_ranks: int, named: dict[int, str] | None = None) -> dict[str, int]:
    """Moonshot's layout after `n_ranks` ranks: 163,584 ranks give [BOS] 163584 ... [UNK] 163839.

    `named`: names by id where a model has others than Moonlight's.
    """
    named = named or {n_ranks + offset: name for name, offset in MOONSHOT_OFFSETS.items()}
    ids = range(n_ranks, n_ranks + MOONSHOT_RESERVED)
    return {named.get(token_id, f"<|reserved_token_{token_id}|>"): token_id for token_id in ids}


def build_files(ranks: Ranks, added_tokens: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, bytes]:
    """Everything a tokenizer folder holds, as bytes that depend on nothing but the arguments."""
    return {
        RANK_FILE: format_ranks(ranks),
        TOKENIZER_JSON: to_json(tokenizer_document(ranks, added_tokens)),
        CONFIG_JSON: to_json(settings),
    }


def special_token(content: str, token_id: int) -> dict[str, Any]:
    """An entry of `added_tokens`."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": content, **flags}


def default_settings(special_tokens: Collection[str], eos_token: str) -> dict[str, Any]:
    """tokenizer_config.json of a tokenizer that came without one: roles by their usual names, Moonlight's chat template."""
    roles = {"bos_token": "[BOS]", "pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": eos_token}
    settings: dict[str, Any] = {role: token for role, token in roles.items() if token in special_tokens}
    if {"<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|im_end|>"} <= set(special_tokens):
        settings["chat_template"] = _CHAT_TEMPLATE
    return {
        **settings,
        "tokenizer_class": TOKENIZER_CLASS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
    }


def special_tokens_of(tokenizer_json: bytes) -> dict[str, int]:
    added = json.loads(tokenizer_json).get("added_tokens", [])
    return {token["content"]: int(token["id"]) for token in added if token.get("special")}


def split_pattern_of(document: dict[str, Any]) -> str | None:
    """The one regular expression by which a tokenizer.json splits text, if that is how it works."""
    pre = document.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    return patterns[0] if len(patterns) == 1 else None


def ranks_of(document: dict[str, Any]) -> Ranks:
    """Ranks of a byte-level BPE tokenizer.json: its vocabulary without added tokens, in id order."""
    model = document.get("model", {})
    if model.get("type") != "BPE":
        raise ValueError(f"{TOKENIZER_JSON}: expected a BPE model, found {model.get('type')!r}")
    added = {token["content"] for token in document.get("added_tokens", [])}
    try:
        ranks = {to_bytes(token): int(rank) for token, rank in model["vocab"].items() if token not in added}
    except KeyError as error:
        raise ValueError(f"{TOKENIZER_JSON}: not byte-level, its vocabulary contains {error.args[0]!r}") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{TOKENIZER_JSON}: its {len(ranks)} ordinary tokens must have the ids 0..{len(ranks) - 1}")
    return ranks


def tokenizer_document(ranks: Ranks, added_tokens: list[dict[str, Any]]) -> dict[str, Any]:
    """The tokenizer.json of these ranks. `added_tokens`: its entries, in the order of their ids."""
    ordered_tokens = sorted(ranks, key=ranks.__getitem__)
    names = [to_characters(token) for token in ordered_tokens]
    merges = []
    for token in ordered_tokens:
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = sorted((ranks[left], ranks[right]) for left, right in splits if left in ranks and right in ranks)
        merges += [[names[left], names[right]] for left, right in pairs]
    byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", **byte_level}]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", **byte_level},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {name: rank for rank, name in enumerate(names)},
            "merges": merges,
        },
    }


def _by_id(ids: dict[Any, int]) -> list[tuple[Any, int]]:
    return sorted(ids.items(), key=lambda item: item[1])


def to_json(value: dict[str, Any]) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def checked_files(tokenizer: TokenizerManifest, storage: Storage) -> dict[str, bytes]:
    """The files of a dataset's tokenizer by name. Raises DamagedFile for one that is not as it was written."""
    files = {entry.path.removeprefix(f"{tokenizer.folder}/"): read_checked(storage, entry) for entry in tokenizer.files}
    found = hashlib.sha256(files.get(TOKENIZER_JSON, b"")).hexdigest()
    if found != tokenizer.sha256:
        where = storage.uri(f"{tokenizer.folder}/{TOKENIZER_JSON}")
        raise DamagedFile(f"{where}: sha256 is {found[:16]}..., the dataset's tokenizer has {tokenizer.sha256[:16]}...")
    return files
