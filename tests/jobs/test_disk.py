"""A disk that is too small for what a run will write is found at the front doors."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs import check, pipeline
from jobs import train as train_command
from pipeline.planner.preparing import checkpoint_bytes, model_bytes
from tests.jobs.conftest import Prepared

pytestmark = pytest.mark.usefixtures("no_ray")


@pytest.mark.parametrize("command", [check.main, pipeline.main, train_command.main], ids=["check", "pipeline", "train"])
def test_checkpoints_that_do_not_fit(
    command, prepared: Prepared, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = 3 * checkpoint_bytes(prepared.config) + model_bytes(prepared.config)  # keep: 2, and one more
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=wanted - 1))
    assert command(prepared.arguments) == 2
    told = capsys.readouterr().err
    assert f"storage.root: {prepared.storage.root} has " in told
    assert "checkpoints and the published model want about" in told
    assert told.endswith("lower checkpoint.keep or choose another folder\n")
    assert told.count("\n") == 1


def test_a_corpus_whose_rows_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("The moon rose late over the sand. " * 30_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=500_000))
    source = f"corpus.sources=[{{name: own, path: {tmp_path / 'data'}, max_epochs: 50}}]"
    assert pipeline.main(["--config", "debug", f"storage.root={tmp_path / 'root'}", source]) == 2
    assert "tokenized and packed rows want about" in capsys.readouterr().err
    assert not (tmp_path / "root").exists() or not list((tmp_path / "root").iterdir())
