"""The command line: what is wrong is told in one line, with exit code 2, before anything starts."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from jobs import pipeline, stages, status
from jobs.cli import open_run
from jobs.stage import main as stage_main
from pipeline.config.load import dump_yaml
from pipeline.config.schema import StorageConfig
from pipeline.storage import open_storage
from pipeline.workflow.record import ProgressFile, StageProgress, add_event
from tests.jobs.conftest import LOOKING, TEXT, Prepared, override

COMMANDS = ("prepare", "train", "evaluate", "publish", "pipeline", "status", "gate", "inspect", "logs", "verify")
pytestmark = pytest.mark.usefixtures("no_ray")


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """A source of its own, as an override."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(TEXT)
    (tmp_path / "empty").mkdir()
    return override(tmp_path / "texts")


def through_pipeline(*overrides: str) -> int:
    return pipeline.main(["--config", "debug", *overrides])


def through_prepare(*overrides: str) -> int:
    return stage_main("prepare", ["--config", "debug", *overrides])


def through_train(*overrides: str) -> int:
    return stage_main("train", ["--config", "debug", *overrides])


Command = Callable[..., int]
BAD = {
    "unknown key": (["training.mikro_batch=1"], "training.mikro_batch: unknown key; did you mean 'micro_batch'?"),
    "wrong type": (["training.micro_batch=two"], "training.micro_batch: input should be a valid integer, got 'two'"),
    "impossible mesh": (["parallelism={shard: 2, ep: 3}"], "parallelism: ep 3 must divide shard 2"),
    "too long": (["training.sequence_length=1024"], "exceeds model.max_position_embeddings 512"),
    "missing corpus": ([override(Path("/no/such/folder"))], "corpus.sources[0].path: /no/such/folder does not exist"),
    "empty corpus": (["EMPTY"], "the corpus would be empty"),
    "unwritable storage": (
        ["storage.root=/dev/null/root"],
        "storage.root: cannot write to /dev/null/root (NotADirector",
    ),
    "unknown storage": (["storage.root=gs://bucket"], "must be a folder or s3://bucket/prefix"),
}


@pytest.mark.parametrize("command", [through_pipeline, through_prepare, through_train])
@pytest.mark.parametrize("mistake", BAD)
def test_bad_input(
    command: Command, mistake: str, corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, message = BAD[mistake]
    overrides = [override(tmp_path / "empty") if each == "EMPTY" else each for each in overrides]
    root = tmp_path / "root"
    assert command(f"storage.root={root}", corpus, *overrides) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1, shown.err
    assert message in shown.err
    assert shown.out in ("", LOOKING)
    assert not root.exists() or list(root.iterdir()) == []


def test_more_tokens_than_the_corpus_holds(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert through_pipeline(f"storage.root={tmp_path / 'root'}", corpus) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: schedule.total_tokens 983,040 asks for 983,040 tokens of source 'web'")
    assert (shown.err.count("\n"), shown.out) == (1, LOOKING)
    assert list((tmp_path / "root").iterdir()) == []


def test_a_stage_alone_without_its_input(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        lambda: pipeline.main(["--config", "debug", "--only", "train", corpus, f"storage.root={tmp_path}"]),
        lambda: through_train(corpus, f"storage.root={tmp_path}"),
    ):
        assert command() == 2
        shown = capsys.readouterr()
        assert "train needs the result of prepare, which is not there; run python -m jobs.prepare" in shown.err
        assert shown.err.count("\n") == 1


def test_a_relative_root_within_a_ray_job(
    corpus: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert through_pipeline("storage.root=runs", corpus) == 2
    assert "storage.root 'runs' is relative, but a Ray job runs in a folder that is deleted" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"jobs.{name}")
    monkeypatch.setattr(sys, "argv", [f"jobs/{name}.py", "--help"])
    main = partial(stage_main, name) if name in stages.names() else module.main
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert f"python -m jobs.{name}" in shown
    assert "--config" in shown


@pytest.mark.parametrize("arguments", [[], ["--config"], ["--config", "debug", "--nonsense"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        pipeline.main(arguments)
    assert exit_.value.code == 2
    assert "usage: python -m jobs.pipeline" in capsys.readouterr().err


def test_open_run_makes_folders_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, storage = open_run("debug", ["storage.root=here/runs", "evaluation.task_folder=own"])
    assert config.storage.root == storage.root == str(tmp_path / "here" / "runs")
    assert config.evaluation.task_folder == str(tmp_path / "own")
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    assert open_run(str(tmp_path / "run.yaml"), [])[0] == config


def test_status_of_an_empty_run(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    arguments = ["--config", "debug", corpus, f"storage.root={root}"]
    assert status.main(arguments) == 2
    assert capsys.readouterr().err == f"error: run_id debug: there is no such run in {root}; there are: none\n"
    assert not root.exists()  # starts nothing, changes nothing
    add_event(open_storage(StorageConfig(root=str(root))), "debug", "started", "prepare")
    assert status.main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"run debug in {root}",
        "  prepare   not done",
        "  train     not done",
        "  evaluate  not done",
        "  publish   not done",
    ]


def test_status_of_a_run_at_work(
    prepared: Prepared, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, run_id = open_storage(prepared.config.storage), prepared.config.run_id
    add_event(storage, run_id, "started", "prepare")
    add_event(storage, run_id, "finished", "prepare", seconds=75.2)
    ProgressFile(storage.config, run_id)(StageProgress("train", 40, 120, "steps", 900.0, "tokens", 95.0))
    capsys.readouterr()
    assert status.main(prepared.arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["  prepare   done  1 min 15 s", "  train     not done"]
    assert lines[5] == "now: train      33%  40/120 steps  900 tokens/s  1 min 35 s left"
    later = time.time() + 600
    monkeypatch.setattr("jobs.views.status.time.time", lambda: later)
    assert status.main(prepared.arguments) == 0
    assert capsys.readouterr().out.splitlines()[5].endswith("left  (no news for 10 min 0 s)")
    storage.delete(f"runs/{run_id}")
