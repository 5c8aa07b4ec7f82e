"""A conversation with a published model: all messages so far by its chat template, and the answer to the last one.

Laid out as in fine-tuning (tokenizer/chat.py), so the model sees the tokens that it was trained on, after the EOS that closes a document;
what somebody types is never a special token. An answer ends with the template's end of a message. Once conversation and answer would not
fit the model's positions, the oldest messages are forgotten, the system's excepted; a message that does not fit alone is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import orjson

from pipeline.generation.published import Published, pieces
from pipeline.generation.sample import Sampling, generate
from pipeline.tokenizer.chat import ASSISTANT


class Conversation:
    """`templated=False`: nothing is remembered, and each line is text to go on from."""

    def __init__(
        self, published: Published, sampling: Sampling, max_new_tokens: int, *, system: str | None, templated: bool
    ) -> None:
        self.templated = templated
        self._published, self._sampling, self._room = published, sampling, max_new_tokens
        self._messages = [] if system is None else [{"role": "system", "content": system}]
        self._fixed = len(self._messages)
        self._answers = 0
        if templated:
            self._marks = published.encoder.chat.marks(published.encoder)

    def say(self, text: str, told: Callable[[str], None] = lambda piece: None) -> str:
        """The answer; `told` hears pieces of it as they come. Raises ValueError for a message that is too long."""
        sampling = replace(self._sampling, seed=self._sampling.seed + self._answers)
        self._answers += 1
        if not self.templated:
            (answer,) = self._published.continuations([text], [sampling], self._room, lambda row, piece: told(piece))
            return answer
        self._messages.append({"role": "user", "content": text})
        prompt = self._prompt()
        encoder, model = self._published.encoder, self._published.model
        hear = pieces(encoder, told)
        (found,) = generate(
            model,
            [prompt],
            [sampling],
            eos=encoder.eos_id,
            max_new_tokens=self._room,
            max_positions=model.config.max_position_embeddings,
            stop=frozenset({self._marks.end}),
            told=lambda row, token: hear(token),
        )
        hear(None)
        answer = encoder.decode(found)
        self._messages.append({"role": ASSISTANT, "content": answer})
        return answer

    def _prompt(self) -> list[int]:
        """The conversation up to where the answer begins, short enough."""
        encoder = self._published.encoder
        limit = self._published.model.config.max_position_embeddings - self._room - 1
        while True:
            ids, _, _ = encoder.chat.encode([orjson.dumps(self._messages)], encoder)
            prompt = [*ids.tolist(), *self._marks.begin]
            if len(prompt) <= limit:
                return prompt
            if len(self._messages) == self._fixed + 1:
                message = self._messages.pop()
                raise ValueError(
                    f"the message has {len(message['content']):,} characters, {len(prompt):,} tokens with what belongs to it, and with "
                    f"an answer of {self._room} the model has room for {max(0, limit):,}: shorten it, or lower --tokens"
                )
            del self._messages[self._fixed]
