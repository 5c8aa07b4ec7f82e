"""A disk that is too small for what a run will write is found at the front doors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_prep.identity import list_corpus
from data_prep.prepare import prepare
from data_prep.room import text_bytes
from jobs import check, pipeline
from jobs import train as train_command
from jobs.stages import prepare as stage
from jobs.stages.records import Records
from pipeline.config.load import ConfigError, load_config
from pipeline.planner.preparing import checkpoint_bytes, mean_bytes, model_bytes, preparing
from pipeline.storage import open_storage
from tests.jobs.conftest import Prepared, override

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


def test_room_for_what_waits_to_be_judged_and_for_the_mean(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not only the newest stay: of 60 steps 12 checkpoints are taken, and a follower that is slow has 8 of them wait."""
    often = ["checkpoint.every_steps=5", "evaluation.follow=true", "publishing.average_last=2"]
    config = load_config("debug", [*prepared.arguments[2:], *often])
    wanted = (2 + 8 + 1 + 1) * checkpoint_bytes(config) + mean_bytes(config) + model_bytes(config)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=wanted - 1))
    assert check.main([*prepared.arguments, *often]) == 2
    assert capsys.readouterr().err.endswith("lower checkpoint.keep or evaluation.waiting or choose another folder\n")


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


def test_what_an_earlier_try_has_written_needs_no_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the last commit, or before rows were packed; and a corpus that has grown."""
    text = "The moon rose late over the sand. " * 50
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"text": f"{n} {text}"}) for n in range(100)]
    (tmp_path / "data" / "a.jsonl").write_text("\n".join(lines))
    corpus = {"sources": [{"name": "own", "path": str(tmp_path / "data"), "max_epochs": 50}], "heldout_fraction": 0.1}
    small = ["tokenizer={vocab_size: 300, training_bytes: 10000}", "model.vocab_size=300", "data.max_padding=1"]
    settings = [f"storage.root={tmp_path / 'root'}", f"corpus={json.dumps(corpus)}", *small]
    config = load_config("debug", settings)
    storage = open_storage(config.storage)

    def fits(free: float, *other: str) -> bool:
        return not refusal(free, *other)

    def refusal(free: float, *other: str) -> str:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        try:
            stage.check(load_config("debug", [*settings, *other]), storage, Records(), here=False)
        except ConfigError as error:
            return str(error)
        return ""

    whole = preparing(config, sum(files.bytes for files in list_corpus(config).values())).dataset_bytes
    assert fits(whole)
    assert "tokenized and packed rows want about" in refusal(whole - 1)
    storage.delete(f"datasets/{prepare(config, storage).identity}")
    assert fits(0)
    shorter = ("data.sequence_length=256", "training.sequence_length=256")  # tokenized already, packed again
    assert fits(whole / 2 + 1, *shorter)
    assert not fits(whole / 2 - 1, *shorter)
    (tmp_path / "data" / "b.jsonl").write_text("\n".join(lines).replace("late", "soon"))
    assert fits(whole + 1)
    assert not fits(whole - 1)
    storage.delete("datasets/packs")
    assert fits(1.5 * whole + 1)
    assert not fits(1.5 * whole - 1)


def test_languages_of_a_source_are_counted_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The moon rose late.")

    def counted(**source: object) -> int:
        config = load_config("debug", [override(tmp_path, **source)])
        return text_bytes(config, list_corpus(config))

    assert counted(languages={"en": 3, "de": 1, "fr": 1}) == counted() == 19
