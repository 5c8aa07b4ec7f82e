"""`python -m jobs.generate` on a published folder: transformers' greedy text, seeds, and what is refused in one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.generate import main
from pipeline.generation.published import load_published
from pipeline.generation.sample import Sampling
from tests.publishing.conftest import PublishedRun, published

PROMPTS = [
    "The moon", "def area(", "x", "月亮升", "It lit the road, the field and", "for i in range(", "class Circle:\n",
    "Ein kurzer Satz", "🌙", "", " ", "\n\n", "print(i, i ** 2)", "[EOS] is only text", "17 houses", "self.r = r",
    "äöüß", "return width * height", "behind it. The", "late.",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> PublishedRun:
    torch.set_num_threads(1)
    return published(str(tmp_path_factory.mktemp("generate")))


def test_greedy_text_is_that_of_transformers(run: PublishedRun):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run.folder), AutoTokenizer.from_pretrained(run.folder)
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt", split_special_tokens=True)["input_ids"].long()
        ids = torch.cat([torch.tensor([[tokenizer.eos_token_id]]), ids], dim=1)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        expected.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    heard = [""] * len(PROMPTS)

    def hear(row: int, piece: str) -> None:
        heard[row] += piece

    found = load_published(str(run.folder)).continuations(PROMPTS, [Sampling()] * len(PROMPTS), 12, hear)
    assert len(PROMPTS) == 20
    assert found == expected == heard


def test_the_command(run: PublishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "prompt.txt").write_text("The moon")
    said = {}
    for name, options in {
        "prompt": ["--prompt", "The moon"],
        "file": ["--file", str(tmp_path / "prompt.txt")],
        "cold": ["--prompt", "The moon", "--temperature", "2", "--top-p", "1e-9"],
        "one": ["--prompt", "The moon", "--temperature", "1", "--seed", "1"],
        "again": ["--prompt", "The moon", "--temperature", "1", "--seed", "1"],
        "two": ["--prompt", "The moon", "--temperature", "1", "--seed", "2"],
    }.items():
        assert main([str(run.folder), "--tokens", "12", *options]) == 0
        said[name], pace = capsys.readouterr()
        assert f"{len(said[name]) - 1} characters in" in pace
    assert said["prompt"] == said["file"] == said["cold"] != said["one"] == said["again"] != said["two"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--temperature", "-1"], "temperature -1.0: give a number from 0"),
        (["--temperature", "nan"], "temperature nan"),
        (["--temperature", "1", "--top-p", "0"], "top_p 0.0: give a probability over 0"),
        (["--top-p", "0.9"], "--top-p 0.9: nothing is drawn at --temperature 0"),
        (["--seed", "0"], "--seed 0: nothing is drawn at --temperature 0"),
        (["--tokens", "0"], "--tokens 0: give a number from 1 on"),
    ],
)
def test_wrong_settings_are_one_line(
    run: PublishedRun, capsys: pytest.CaptureFixture[str], change: list[str], message: str
):
    assert main([str(run.folder), "--prompt", "x", *change]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_wrong_folders_are_one_line(run: PublishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def refused(folder: Path) -> str:
        assert main([str(folder), "--prompt", "x"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "there is no config.json; give a folder in the format of Hugging Face" in refused(tmp_path / "nothing")
    copy = tmp_path / "copy"
    shutil.copytree(run.folder, copy)
    for name in ("config.json", "tokenizer.json", next(copy.glob("*.safetensors")).name):
        data = (copy / name).read_bytes()
        (copy / name).write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        assert f"{name}: " in refused(copy)  # the manifest vouches for it
        (copy / name).write_bytes(data)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert "or remove manifest.json if it was changed on purpose" in refused(copy)
    (copy / "manifest.json").unlink()  # as of any other folder of this network
    (copy / "tokenizer.json").unlink()
    assert "there is no tokenizer.json" in refused(copy)
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"hidden_size": 32', '"hidden_size": 40'))
    assert "shape" in refused(copy)
    (copy / "config.json").write_text(config.replace('"hidden_size": 32', '"hidden_size": -1'))
    assert "config.json" in refused(copy)
    next(copy.glob("*.safetensors")).unlink()
    (copy / "config.json").write_text(config)
    assert "not there; fetch it again" in refused(copy)


def test_help_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; from jobs.generate import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--temperature" in done.stdout
