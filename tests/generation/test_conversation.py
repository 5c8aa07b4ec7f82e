"""What a conversation sends to the model, when it ends, and what it forgets."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch

from jobs.views.chat import talk
from pipeline.config.schema import TokenizerConfig
from pipeline.generation import conversation as conversations
from pipeline.generation.conversation import Conversation
from pipeline.generation.published import Published
from pipeline.generation.sample import Sampling
from pipeline.model.hf import hf_config, hf_tensors
from pipeline.model.moonlight import Moonlight
from pipeline.tokenizer import Encoder, train_tokenizer
from pipeline.tokenizer.chat import conversation_of
from tests.evaluation.make import TEXTS
from tests.model.oracle import random_model, small_config
from tests.tokenizer.test_chat import SPECIAL


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    folder = tmp_path_factory.mktemp("talks")
    config = TokenizerConfig(vocab_size=500, special_tokens=SPECIAL)
    for name, data in train_tokenizer([text for texts in TEXTS.values() for text in texts], config).items():
        (folder / name).write_bytes(data)
    return Published(random_model(small_config(vocab_size=500)).eval().requires_grad_(False), Encoder.load(folder))


def test_the_model_sees_the_template_and_ends_with_it(published: Published, monkeypatch: pytest.MonkeyPatch):
    end = published.encoder.special_tokens["<|im_end|>"]
    seen: list[list[int]] = []
    said = published.encoder.encode([b"def area(w):"])[0].tolist()

    def scripted(model: Moonlight, prompts: list[list[int]], sampling: object, **options: object) -> list[list[int]]:
        seen.append(prompts[0])
        assert options["stop"] == frozenset({end})
        for token in said:
            options["told"](0, token)  # type: ignore[operator]
        return [said]

    monkeypatch.setattr(conversations, "generate", scripted)
    heard: list[str] = []
    talking = Conversation(published, Sampling(), 20, system="Be brief.", templated=True)
    assert talking.say("What?", heard.append) == "".join(heard) == "def area(w):"
    talking.say("<|im_end|> again")
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "def area(w):"}, {"role": "user", "content": "<|im_end|> again"},
    ]  # fmt: skip
    for prompt, count in zip(seen, (2, 4)):
        ids, _, _ = published.encoder.chat.encode([conversation_of(messages[:count])[0]], published.encoder)
        assert prompt == [*ids.tolist(), *published.encoder.chat.marks(published.encoder).begin]
    assert seen[1].count(end) == 4


def test_the_oldest_messages_are_forgotten_and_the_systems_never(published: Published):
    talking = Conversation(published, Sampling(1.0), 8, system="S", templated=True)
    prompts = []
    for number in range(12):
        talking._messages.append({"role": "user", "content": f"number {number}"})
        prompts.append(published.encoder.decode(talking._prompt()))
        talking._messages.append({"role": "assistant", "content": f"answer {number}"})
    assert all("<|im_middle|>S<|im_end|>" in prompt for prompt in prompts)
    assert "number 0" in prompts[0]
    assert "number 0" not in prompts[-1]
    assert "number 11" in prompts[-1]
    with pytest.raises(ValueError, match=r"the message has 2,000 characters, .* shorten it, or lower --tokens"):
        talking.say("x y z " * 333 + "xy")


def test_answers_are_repeatable_and_differ_from_turn_to_turn(published: Published):
    def three() -> list[str]:
        talking = Conversation(published, Sampling(1.0, seed=3), 8, system=None, templated=True)
        return [talking.say("again") for _ in range(3)]

    assert three() == three()
    assert len(set(three())) > 1


@pytest.fixture(scope="module")
def folder(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import json

    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("folder")
    save_file({name: tensor.clone() for name, tensor in hf_tensors(published.model)}, path / "model.safetensors")
    fields = hf_config(
        published.model.config, bos_token_id=None, eos_token_id=published.encoder.eos_id, dtype="float32"
    )
    (path / "config.json").write_text(json.dumps(fields))
    for name, data in published.encoder._files.items():
        (path / name).write_bytes(data)
    return path


def test_lines_in_answers_out(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    torch.manual_seed(0)
    options = {
        "system": None,
        "base": False,
        "tokens": 6,
        "temperature": 0.0,
        "top_p": None,
        "seed": None,
        "endpoint_url": None,
    }
    for base in (False, True):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nAnd?\n\nnever read\n"))
        assert talk(str(folder), **options | {"base": base}) == 0
        out, err = capsys.readouterr()
        assert out.count("\n") >= 2
        assert ("a message" in err) != base
    assert talk(str(folder), **options | {"base": True, "system": "x"}) == 2
    assert "--system: there is no chat template" in capsys.readouterr().err
    assert talk(str(folder / "nowhere"), **options) == 2
    assert capsys.readouterr().err.startswith("error: ")
