"""Conversations as tokens, by the tokenizer's own chat template, and where their answers are.

A template writes special tokens, role names and the contents of messages. It is asked once for each sequence of roles, with
placeholders for contents, and what it wrote is cut into special tokens (by id) and text. So the name of a special token in what
somebody said stays text, and the ids are those that the tokenizer gives for the rendered template, as long as text of the template
and a message never meet without a special token between them: then they would be one piece of text, with other tokens than its parts.
Such a template is refused. Moonlight's is not:

    <|im_user|>user<|im_middle|>content<|im_end|><|im_assistant|>assistant<|im_middle|>answer<|im_end|>

An answer begins after what the template writes to ask for one (`add_generation_prompt`) and ends with the special token that follows it.
Special tokens never come from text, so those ids mark answers in any row of tokens: nothing else need be stored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import orjson
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.tokenizer.files import CONFIG_JSON, TOKENIZER_JSON
from pipeline.tokenizer.given import CHAT_TEMPLATE

ASSISTANT = "assistant"
_PLACE = re.compile("\ue000(\\d+)\ue001")  # of a content


@dataclass(frozen=True)
class AnswerMarks:
    """Token ids: what stands before every answer, and what ends it."""

    begin: tuple[int, ...]
    end: int


@dataclass(frozen=True)
class Content:
    """The content of a message, by its number."""

    message: int


class Encodes(Protocol):
    """An `Encoder`, as far as it is needed here."""

    def encode(self, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]: ...


Part = int | bytes | Content  # a special token, text of the template, text of a message


class ChatTemplate:
    """The chat template of a tokenizer's files. Raises ValueError if there is none, or one that cannot be used here."""

    def __init__(self, files: dict[str, bytes]) -> None:
        source = template_of(files)
        if source is None:
            raise ValueError(
                "the tokenizer has no chat template: take one that has (tokenizer_config.json or chat_template.jinja), or name "
                "Moonlight's <|im_...|> tokens in tokenizer.special_tokens"
            )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        self._template = environment.from_string(source)
        settings = orjson.loads(files[CONFIG_JSON]) if CONFIG_JSON in files else {}
        names = {role: settings.get(role) for role in ("bos_token", "eos_token", "pad_token", "unk_token")}
        self._names = {
            role: name["content"] if isinstance(name, dict) else name for role, name in names.items() if name
        }
        added = orjson.loads(files[TOKENIZER_JSON])["added_tokens"]
        self._special: dict[str, int] = {token["content"]: token["id"] for token in added}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._cut = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.parts = lru_cache(maxsize=4096)(self._parts)

    def _parts(self, roles: tuple[str, ...]) -> tuple[Part, ...]:
        """What a conversation of these roles is made of. Raises ValueError if the template cannot lay it out."""
        parts: list[Part] = []
        text = self._render(roles)
        for index, piece in enumerate(_PLACE.split(text)):
            if index % 2:
                parts.append(Content(int(piece)))
            else:
                parts += self._pieces(piece)
        for before, after in zip(parts, parts[1:]):
            if not isinstance(before, int) and not isinstance(after, int):
                raise ValueError(
                    f"the tokenizer's chat template writes {_shown(before)} and {_shown(after)} without a special token between them; "
                    "training on conversations needs one that separates them, as Moonlight's does"
                )
        found = [part.message for part in parts if isinstance(part, Content)]
        if found != list(range(len(roles))):
            raise ValueError(
                f"the tokenizer's chat template does not write each message of {list(roles)} once, in order"
            )
        return tuple(parts)

    def _pieces(self, text: str) -> list[Part]:
        """Special tokens and the text between them."""
        found: list[Part] = []
        at = 0
        for match in self._cut.finditer(text):
            found += [text[at : match.start()].encode()] if match.start() > at else []
            found.append(self._special[match.group()])
            at = match.end()
        return found + ([text[at:].encode()] if at < len(text) else [])

    def _render(self, roles: Sequence[str], **options: Any) -> str:
        messages = [{"role": role, "content": f"\ue000{number}\ue001"} for number, role in enumerate(roles)]
        try:
            return self._template.render(
                messages=messages, **{"add_generation_prompt": False, "tools": None, **self._names, **options}
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the tokenizer's chat template refuses messages of {list(roles)}: {error}") from None

    def marks(self, encoder: Encodes) -> AnswerMarks:
        """Where answers are. Raises ValueError for a template whose answers cannot be told by special tokens."""
        roles = ("user",)
        asked, plain = self._render(roles, add_generation_prompt=True), self._render(roles)
        if not asked.startswith(plain) or asked == plain:
            raise ValueError(
                "the tokenizer's chat template has no add_generation_prompt that goes on where messages end"
            )
        prompt = _encoded(self._pieces(asked[len(plain) :]), [], encoder)
        parts = self.parts((*roles, ASSISTANT))
        at = parts.index(Content(1))
        before = _encoded(list(parts[:at]), [b"", b""], encoder)
        end = parts[at + 1] if at + 1 < len(parts) else None
        special = set(self._special.values())
        if before[-len(prompt) :] != prompt or not isinstance(end, int) or not {prompt[0], prompt[-1]} <= special:
            raise ValueError(
                "the tokenizer's chat template does not put answers between its generation prompt and a special token"
            )
        return AnswerMarks(tuple(prompt), end)

    def encode(self, conversations: Sequence[bytes], encoder: Encodes) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Token ids uint32 [N] of conversations (as `conversation_of` gives them), offsets int64 [n + 1], and bytes of text of each."""
        laid_out: list[list[Part]] = []
        texts: list[bytes] = []
        sizes: list[int] = []
        for data in conversations:
            messages = orjson.loads(data)
            contents = [message["content"].encode() for message in messages]
            parts = self.parts(tuple(message["role"] for message in messages))
            plain = [contents[part.message] if isinstance(part, Content) else part for part in parts]
            laid_out.append(plain)
            said = [part for part in plain if isinstance(part, bytes) and part]
            texts += said
            sizes.append(sum(map(len, said)))
        ids, offsets = encoder.encode(texts)
        pieces, lengths, at = [], [0], 0
        for plain in laid_out:
            length = 0
            for part in plain:
                if isinstance(part, int):
                    pieces.append(np.array([part], np.uint32))
                    length += 1
                elif part:
                    assert isinstance(part, bytes)
                    pieces.append(ids[offsets[at] : offsets[at + 1]])
                    length += len(pieces[-1])
                    at += 1
            lengths.append(length)
        whole = np.concatenate(pieces) if pieces else np.zeros(0, np.uint32)
        return whole, np.cumsum(np.array(lengths, np.int64)), sizes


def conversation_of(value: Any) -> tuple[bytes, str]:
    """(the conversation as JSON, '') of a list of messages, or (b'', why it is none): `not_messages` or `no_answer`."""
    if not isinstance(value, list) or not value:
        return b"", "not_messages"
    messages = []
    for message in value:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str) or not re.fullmatch(r"[a-z_]{1,32}", role):
            return b"", "not_messages"
        messages.append({"role": role, "content": content})
    answered = any(message["role"] == ASSISTANT and message["content"] for message in messages)
    return orjson.dumps(messages), "" if answered else "no_answer"


def said(conversation: bytes) -> str:
    """What is said in it (`conversation_of`), without who says it; a message a line."""
    return "\n".join(message["content"] for message in orjson.loads(conversation))


def template_of(files: dict[str, bytes]) -> str | None:
    """A file of its own goes before the one in the settings, as transformers has it."""
    if CHAT_TEMPLATE in files:
        return files[CHAT_TEMPLATE].decode()
    found = orjson.loads(files[CONFIG_JSON]).get("chat_template") if CONFIG_JSON in files else None
    if isinstance(found, list):  # several, by name
        found = next((each["template"] for each in found if each.get("name") == "default"), None)
    return found


def _encoded(parts: Sequence[Part], contents: Sequence[bytes], encoder: Encodes) -> list[int]:
    found: list[int] = []
    for part in parts:
        text = contents[part.message] if isinstance(part, Content) else part
        found += [text] if isinstance(text, int) else encoder.encode([text])[0].tolist() if text else []
    return found


def _shown(part: Part) -> str:
    return "a message" if isinstance(part, Content) else repr(part.decode()) if isinstance(part, bytes) else str(part)


def _refuse(message: str) -> None:
    raise TemplateError(message)
