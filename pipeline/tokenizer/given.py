"""A tokenizer that somebody else made: every part of its files is used, or refused by name.

`tokenizer.json` decides: it is run as it stands and published as it stands, by `PreTrainedTokenizerFast`, which reads all of
it. (The tokenizer classes of single models rebuild parts of it from code; which class was named is said in a note.) What
belongs to a call, truncation and padding, is taken out of it; sides and pad token move to tokenizer_config.json.

`tokenizer_config.json`, `special_tokens_map.json` and chat templates are kept: roles, flags, sides. They may name no token
that tokenizer.json has not, since loading would give it an id that the network has no row for.

Refused, because ids could not be the same in training and after publishing, or text would be lost: a model that is not
byte-level BPE, BPE dropout, a byte without a token, ids that `tokenizers` would renumber, a post-processor with other ids,
an EOS that ordinary text can produce.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from pipeline.config.schema import TokenizerConfig
from pipeline.tokenizer.engines import Reference, is_failure, ranks_behind
from pipeline.tokenizer.files import (
    CONFIG_JSON,
    MOONSHOT_RESERVED,
    RANK_FILE,
    TOKENIZER_CLASS,
    TOKENIZER_JSON,
    Ranks,
    default_settings,
    format_ranks,
    moonshot_special_tokens,
    parse_ranks,
    special_token,
    special_tokens_of,
    to_json,
    tokenizer_document,
)
from pipeline.tokenizer.pattern import byte_alphabet, to_bytes

SPECIAL_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
CHAT_TEMPLATE = "chat_template.jinja"
CHAT_TEMPLATES = "additional_chat_templates"  # folder of further *.jinja
NAMES = (RANK_FILE, TOKENIZER_JSON, CONFIG_JSON, SPECIAL_MAP, ADDED_TOKENS, CHAT_TEMPLATE)  # that are looked for
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
LOCAL = ("name_or_path", "tokenizer_file", "special_tokens_map_file", "vocab_file", "merges_file", "auto_map")
LISTS = ("additional_special_tokens", "extra_special_tokens")
GENERIC_CLASSES = {TOKENIZER_CLASS, "TokenizersBackend", "PreTrainedTokenizer", "TikTokenTokenizer"}


@dataclass(frozen=True)
class Given:
    files: dict[str, bytes]  # to commit
    notes: tuple[str, ...]  # what whoever prepares a corpus should know


def read_tokenizer(files: dict[str, bytes], config: TokenizerConfig) -> dict[str, bytes]:
    """The files to commit for a given rank file or `tokenizer.json`. Raises ValueError naming what is wrong."""
    return read_given(files, config).files


def read_given(files: dict[str, bytes], config: TokenizerConfig) -> Given:
    notes: list[str] = []
    settings = _object(files, CONFIG_JSON) if CONFIG_JSON in files else None
    if TOKENIZER_JSON in files:
        document = _checked(files, notes)
    elif RANK_FILE in files:
        ranks = parse_ranks(files[RANK_FILE])
        document = tokenizer_document(ranks, _moonshots_tokens(ranks, settings or {}))
    else:
        raise ValueError(f"tokenizer.path: no {RANK_FILE} and no {TOKENIZER_JSON} there")
    moved = _without_call_settings(document, notes)
    as_given = TOKENIZER_JSON in files and not moved
    data = files[TOKENIZER_JSON] if as_given else to_json(document)
    special = special_tokens_of(data)
    if settings is None:
        settings = {**default_settings(special, _eos(config, {}, special)), **moved}
    else:
        settings = {**moved, **_with_map(files, settings)}
        _check_settings(files, settings, document)
        settings = _published_settings(settings, _eos(config, settings, special), notes)
    absent = [token for token in config.special_tokens or () if token not in special]
    if absent:
        raise ValueError(
            f"tokenizer.special_tokens: {absent[0]!r} is not a special token of the tokenizer that was loaded; "
            f"it has {', '.join(token for token in special if 'reserved' not in token)}"
        )
    kept = {name: content for name, content in files.items() if name.endswith(".jinja")}
    found = {TOKENIZER_JSON: data, CONFIG_JSON: to_json(settings), **kept}
    _check_run(found, _content(settings["eos_token"]), notes)
    same = ranks_behind(document)
    return Given(found if same is None else {RANK_FILE: format_ranks(same), **found}, tuple(notes))


# -- tokenizer.json --------------------------------------------------------------------------------------------------


def _object(files: dict[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(files[name])
    except ValueError as error:
        raise ValueError(f"{name}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name}: not a JSON object")
    return value


def _checked(files: dict[str, bytes], notes: list[str]) -> dict[str, Any]:
    document = _object(files, TOKENIZER_JSON)
    problem = next(_problems(document), None)
    if problem:
        raise ValueError(f"{TOKENIZER_JSON}: {problem}")
    document["added_tokens"] = document.get("added_tokens") or []
    if RANK_FILE in files and ranks_behind(document) != parse_ranks(files[RANK_FILE]):
        raise ValueError(f"{RANK_FILE} and {TOKENIZER_JSON} are two different tokenizers: take one of them away")
    if document.get("normalizer"):
        notes.append(
            f"{TOKENIZER_JSON} has a normalizer: ids stand for the normalized text, not for every byte of the given"
        )
    return document


def _problems(document: dict[str, Any]) -> Iterator[str]:
    """What can be seen without running it."""
    model = document.get("model") or {}
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        yield f"model: {model.get('type')!r} is not supported, only byte-level BPE is"
        return
    if model.get("dropout"):
        yield f"model.dropout {model['dropout']}: ids would differ from call to call; set it to null"
    for part in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(part):
            yield f"model.{part} {model[part]!r} is not supported, only byte-level BPE is"
    if model.get("byte_fallback"):
        yield "model.byte_fallback is not supported, only byte-level BPE is"
    for part in ("pre_tokenizer", "normalizer"):
        if any(step.get("type") == "ByteLevel" for step in steps_of(document.get(part))):
            break
    else:
        yield "pre_tokenizer: no ByteLevel step; only byte-level BPE is supported"
    missing = [byte for byte, character in enumerate(byte_alphabet()) if character not in model["vocab"]]
    if missing:
        yield f"model.vocab: byte {missing[0]:#04x} has no token, text with it would be lost; add {byte_alphabet()[missing[0]]!r}"
    for token in document.get("added_tokens") or []:
        absent = [name for name in ("id", "content", *FLAGS) if name not in token]
        if absent:
            yield f"added_tokens: {token.get('content')!r} has no {absent[0]!r}"
    ids = list(model["vocab"].values())
    if len(set(ids)) != len(ids):
        yield "model.vocab: two tokens have the same id"


def steps_of(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences opened."""
    if not part:
        return []
    inner = part.get("pretokenizers") or part.get("normalizers")
    return [step for item in inner for step in steps_of(item)] if inner else [part]


def _without_call_settings(document: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Take truncation and padding out of tokenizer.json; what they say beyond one call, for tokenizer_config.json."""
    moved: dict[str, Any] = {}
    for part, side in (("truncation", "truncation_side"), ("padding", "padding_side")):
        if document.get(part):
            moved[side] = str(document[part].get("direction", "right")).lower()
            if part == "padding":
                moved["pad_token"] = document[part].get("pad_token")
            notes.append(f"{TOKENIZER_JSON} {part} belongs to a call and is left out; documents are encoded whole")
        document[part] = None
    return {name: value for name, value in moved.items() if value is not None}


def _check_run(files: dict[str, bytes], eos: str, notes: list[str]) -> None:
    """What only running it shows: ids as the published tokenizer gives them, special tokens, nothing lost."""
    try:
        reference = Reference(files)
    except BaseException as error:
        if not is_failure(error):
            raise
        raise ValueError(f"{TOKENIZER_JSON}: Hugging Face's tokenizers cannot load it: {error}") from None
    document = json.loads(files[TOKENIZER_JSON])
    tokenizer, vocabulary = reference.tokenizer, document["model"]["vocab"]
    for token in document["added_tokens"]:
        given = tokenizer.token_to_id(token["content"])
        if given != token["id"]:
            hint = "its vocabulary has that token"
            if token["content"] not in vocabulary:
                hint = (
                    f"it numbers added tokens without holes after the vocabulary's {len(vocabulary)} tokens; fill the hole with "
                    f"tokens such as <|reserved_token_{token['id'] - 1}|>, or correct the ids"
                )
            raise ValueError(
                f"{TOKENIZER_JSON}: added_tokens: {token['content']!r} has id {token['id']}, but Hugging Face's tokenizers gives it "
                f"{given}: {hint}"
            )
    special = special_tokens_of(files[TOKENIZER_JSON])
    found = np.intersect1d(reference.ids(eos.encode()), np.array(list(special.values()), np.uint32))
    if special[eos] in found:
        raise ValueError(
            f"{TOKENIZER_JSON}: the text {eos!r} in a document gives the EOS id {special[eos]} though it is split"
        )
    _check_losslessness(reference, document)
    _check_post_processor(tokenizer, notes)


def _check_losslessness(reference: Reference, document: dict[str, Any]) -> None:
    """A pre-tokenizer may throw away what it splits at. A normalizer changes text on purpose."""
    if document.get("normalizer") or any(token["lstrip"] or token["rstrip"] for token in document["added_tokens"]):
        return
    text = "It's 1234 words,  two spaces\t\ttabs\n\n漢字 – ünïcödé_snake-case (x)  "
    table = token_bytes(document)
    back = b"".join(table[token_id] for token_id in reference.ids(text.encode()).tolist()).decode(errors="replace")
    if any(step.get("add_prefix_space") for step in steps_of(document.get("pre_tokenizer"))):  # of each piece, perhaps
        rest = iter(back)
        lost = not all(character in rest for character in text)
    else:
        lost = back != text
    if lost:
        raise ValueError(f"{TOKENIZER_JSON}: pre_tokenizer: text is lost, {text!r} comes back as {back!r}")


def token_bytes(document: dict[str, Any]) -> dict[int, bytes]:
    """The bytes that each id stands for. Added tokens are written as they are, the vocabulary in the byte alphabet."""
    table = {}
    for name, token_id in document["model"]["vocab"].items():
        try:
            table[token_id] = to_bytes(name)
        except KeyError:  # a token that bytes cannot form, such as a special token kept in the vocabulary
            table[token_id] = name.encode()
    return {**table, **{token["id"]: token["content"].encode() for token in document["added_tokens"]}}


def _check_post_processor(tokenizer: Tokenizer, notes: list[str]) -> None:
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a", add_special_tokens=True)
    for token, token_id in zip(whole.tokens, whole.ids):
        if tokenizer.token_to_id(token) != token_id:
            raise ValueError(
                f"{TOKENIZER_JSON}: post_processor: it gives {token!r} the id {token_id}, but it is {tokenizer.token_to_id(token)}"
            )
    if whole.ids != plain.ids:
        around = [token for token in whole.tokens if token not in plain.tokens]
        notes.append(
            f"the published tokenizer puts {' '.join(around)} around a text unless it is called with add_special_tokens=False; "
            "rows of training hold documents closed by EOS and nothing else"
        )


# -- what stands beside it -------------------------------------------------------------------------------------------


def _moonshots_tokens(ranks: Ranks, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Moonshot's rule: 256 ids after the ranks, named by `added_tokens_decoder` of tokenizer_config.json if there is one."""
    described = {int(number): token for number, token in (settings.get("added_tokens_decoder") or {}).items()}
    outside = [number for number in described if not len(ranks) <= number < len(ranks) + MOONSHOT_RESERVED]
    if outside:
        raise ValueError(
            f"{CONFIG_JSON}: added_tokens_decoder: id {outside[0]} is not one of the {MOONSHOT_RESERVED} after the "
            f"{len(ranks)} ranks of {RANK_FILE}"
        )
    special = moonshot_special_tokens(len(ranks), {number: token["content"] for number, token in described.items()})
    if len(special) != MOONSHOT_RESERVED:
        raise ValueError(f"{CONFIG_JSON}: added_tokens_decoder: two ids have the same content")
    return [
        {
            **special_token(content, number),
            **{flag: value for flag, value in described.get(number, {}).items() if flag in FLAGS},
        }
        for content, number in special.items()
    ]


def _with_map(files: dict[str, bytes], settings: dict[str, Any]) -> dict[str, Any]:
    """special_tokens_map.json counts, as in transformers, where tokenizer_config.json describes no tokens itself."""
    if SPECIAL_MAP in files and "added_tokens_decoder" not in settings:
        for key, value in _object(files, SPECIAL_MAP).items():
            plain = [_content(item) for item in value] if isinstance(value, list) else _content(value)
            settings = {**settings, key: plain}
    return settings


def _content(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _named_tokens(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, token) of every role."""
    for key, value in settings.items():
        if key.endswith("_token") and isinstance(_content(value), str):
            yield key, _content(value)
        elif key in LISTS and value:
            for item in value.values() if isinstance(value, dict) else value:
                yield key, _content(item)


def _check_settings(files: dict[str, bytes], settings: dict[str, Any], document: dict[str, Any]) -> None:
    """Nothing that would change the tokenizer when `AutoTokenizer` loads it."""
    known = {token["content"]: token for token in document["added_tokens"]}
    for key, token in _named_tokens(settings):
        if token not in known:
            raise ValueError(
                f"{CONFIG_JSON}: {key} {token!r} is not an added token of {TOKENIZER_JSON}; loading would give it a new id. Add it "
                "there, or take it away here"
            )
    for number, described in (settings.get("added_tokens_decoder") or {}).items():
        here = known.get(described.get("content"))
        there = {"id": int(number), **{flag: described.get(flag, False) for flag in FLAGS}}
        if here is None or any(here[name] != value for name, value in there.items()):
            raise ValueError(
                f"{CONFIG_JSON}: added_tokens_decoder: {number} {described.get('content')!r} is not as in {TOKENIZER_JSON} "
                f"({here}); loading would change it. Make them agree"
            )
    if ADDED_TOKENS in files:
        for content, number in _object(files, ADDED_TOKENS).items():
            if known.get(content, {}).get("id") != number:
                raise ValueError(
                    f"{ADDED_TOKENS}: {content!r} has id {number}, but not in {TOKENIZER_JSON}; make them agree"
                )
    if settings.get("fix_mistral_regex"):
        raise ValueError(
            f"{CONFIG_JSON}: fix_mistral_regex replaces the split pattern when the tokenizer is loaded; give the folder that "
            "AutoTokenizer.from_pretrained(..., fix_mistral_regex=True).save_pretrained(...) writes"
        )
    prefixed = [
        step["add_prefix_space"] for step in steps_of(document.get("pre_tokenizer")) if "add_prefix_space" in step
    ]
    if "add_prefix_space" in settings and prefixed and bool(settings["add_prefix_space"]) != any(prefixed):
        raise ValueError(
            f"{CONFIG_JSON}: add_prefix_space is {settings['add_prefix_space']}, but {any(prefixed)} in the pre_tokenizer of "
            f"{TOKENIZER_JSON}; make them agree"
        )


def _eos(config: TokenizerConfig, settings: dict[str, Any], special: dict[str, int]) -> str:
    """The token that closes a document: the configuration's, else the tokenizer's own, else [EOS]."""
    eos = config.eos_token or _content(settings.get("eos_token")) or ("[EOS]" if "[EOS]" in special else None)
    if eos is None:
        raise ValueError(
            f"tokenizer.eos_token: the tokenizer names none; say which of its special tokens ends a document: {', '.join(special)}"
        )
    if eos not in special:
        where = "tokenizer.eos_token" if config.eos_token else f"{CONFIG_JSON}: eos_token"
        raise ValueError(f"{where}: {eos!r} is not a special token of {TOKENIZER_JSON}")
    return str(eos)


def _published_settings(settings: dict[str, Any], eos: str, notes: list[str]) -> dict[str, Any]:
    """As given, but for the token that ends a document, the class, and what is true of one machine or of another file."""
    own = settings.get("tokenizer_class") or TOKENIZER_CLASS
    if own not in GENERIC_CLASSES:
        notes.append(
            f"{CONFIG_JSON} names {own}, which builds parts of a tokenizer from code; published as {TOKENIZER_CLASS}, which takes "
            f"all of {TOKENIZER_JSON}"
        )
    kept = {name: value for name, value in settings.items() if name not in (*LOCAL, "added_tokens_decoder")}
    kept["eos_token"] = settings["eos_token"] if _content(settings.get("eos_token")) == eos else eos
    return {"clean_up_tokenization_spaces": False, **kept, "tokenizer_class": TOKENIZER_CLASS}
