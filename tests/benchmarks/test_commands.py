"""Every benchmark as somebody starts it who has not read it: what it takes, and no traceback for what it does not."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
MODULES = [path.stem for path in sorted(FOLDER.glob("*.py")) if '"__main__"' in path.read_text()]
COMMANDS = [name for name in MODULES if "parse_args" in (FOLDER / f"{name}.py").read_text()]
WRONG = [
    ("checkpoint", ["--layers", "0"], "argument --layers: '0' is not a whole number above 0"),
    ("corpus", ["--documents", "many"], "argument --documents: 'many' is not a whole number above 0"),
    ("corpus", ["--peer-python", "/no/python"], "--peer-python: '/no/python' is not a program"),
    ("corpus", ["--prose", "/no/folder"], "--prose: there is no folder '/no/folder'"),
    ("evaluate", ["--only", "MMLU"], "--only: 'MMLU' is none of"),
    ("export", ["--workers", "1"], "--workers: 2 of them"),
    ("muon_step", ["--dion", "/"], "--dion: there is no package dion in '/'"),
    ("muon_step", ["--preset", "huge"], "--preset: invalid choice: 'huge'"),
    ("planning", ["--only", "disk"], "--only: invalid choice: 'disk'"),
    ("train_step", ["--sizes", "demo,huge"], "--sizes: 'huge' is none of demo, wide"),
    ("train_step", ["--torchtitan", "/"], "--torchtitan: there is no package torchtitan in '/'"),
    ("verdicts", [], "the following arguments are required: --peer-python"),
    ("elastic", [], "the following arguments are required: elastic, whole"),
    ("gpu", ["--device", "cuda"], "--device cpu --tiny runs through without one"),
    ("cluster", [], "--tiny runs through on gloo ranks"),
]


def start(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main()
    return ended.value.code


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, monkeypatch, capsys):
    assert start(name, ["--help"], monkeypatch) == 0
    assert capsys.readouterr().out.startswith("usage: ")


@pytest.mark.parametrize(("name", "arguments", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_named(name, arguments, message, monkeypatch, capsys):
    if "--tiny runs through" in message and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert start(name, arguments, monkeypatch) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_that_is_none(name, monkeypatch, capsys):
    assert start(name, ["--no-such-option"], monkeypatch) == 2
    assert capsys.readouterr().err.startswith("usage: ")


@pytest.mark.parametrize(
    "name", sorted({*MODULES} - {*COMMANDS} - {"corpus_datatrove", "prepare_datatrove", "verdicts_datatrove"})
)
def test_a_part_says_whose_it_is(name):
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"a part of python -m benchmarks\.\w+, which starts it\n", done.stderr)


@pytest.mark.parametrize("name", ["overlap", "cluster"])
def test_ranks_are_started(name, monkeypatch):
    """Elsewhere than under torchrun the command becomes torchrun."""
    told: list[list[str]] = []

    def execv(program: str, arguments: list[str]) -> None:
        told.append(arguments)
        raise SystemExit(0)

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(os, "execv", execv)
    arguments = {"overlap": ["--rounds", "3"], "cluster": ["--tiny"]}[name]
    start(name, arguments, monkeypatch)
    assert told[0][1:] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m", f"benchmarks.{name}"),
        *arguments,
    ]


@pytest.mark.long
def test_overlap_as_the_readme_says():
    command = [sys.executable, "-m", "benchmarks.overlap", "--rounds", "1", "--delay-ms", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout.splitlines()[-1])
    assert found["benchmark"] == "overlap/delayed"
