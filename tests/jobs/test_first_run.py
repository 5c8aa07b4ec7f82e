"""The first hour: `moonlight init` and `check` on data with field names of its own, and the console command itself."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import check, init, main, stages
from pipeline.config.load import ConfigError, load_config

pytestmark = pytest.mark.usefixtures("no_ray")
TEXTS = [f"Page {number}. " + "The moon rose late over the sand. " * (20 + number % 7) for number in range(120)]


def as_jsonl(folder: Path) -> None:
    rows = [{"uid": f"u{n}", "title": "Moon", "body": text, "meta": {"n": n}} for n, text in enumerate(TEXTS)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_parquet(folder: Path) -> None:
    pq.write_table(pa.table({"url": [f"u{n}" for n in range(len(TEXTS))], "content": TEXTS}), folder / "a.parquet")


def as_csv(folder: Path) -> None:
    with (folder / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "story"), *((str(n), text) for n, text in enumerate(TEXTS))])


def as_text(folder: Path) -> None:
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)


@pytest.mark.parametrize(
    ("make", "fields"),
    [(as_jsonl, ("body", "uid")), (as_parquet, ("content", "url")), (as_csv, ("story", "id")), (as_text, ("text", None))],
    ids=["jsonl", "parquet", "csv", "text"],
)  # fmt: skip
def test_a_configuration_for_what_is_there(
    make, fields, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "My Data.v2"
    folder.mkdir()
    make(folder)
    monkeypatch.chdir(tmp_path)
    assert init.main(["My Data.v2"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "  of the first 100 records 100 kept"
    config = load_config("run.yaml")
    source = config.corpus.sources[0]
    assert (source.text_field, source.id_field) == fields
    assert (config.run_id, config.storage.root) == ("my-data", str(tmp_path / "store"))
    assert config.model == load_config("debug").model
    assert check.main(["--config", "run.yaml", "--document"]) == 0
    shown = capsys.readouterr().out
    assert "of the first 100 records 100 kept" in shown
    assert "Page 0. The moon rose late" in shown
    assert shown.endswith("nothing is wrong that can be known beforehand\n")
    assert not (tmp_path / "store").exists()
    assert init.main(["My Data.v2"]) == 2
    assert capsys.readouterr().err == "error: --output run.yaml is there already; give another name\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "does not exist"), ({}, "holds no file"), ({"a.jsonl": '{"n": 1}\n'}, "no field of a.jsonl holds text; it has n")],
)  # fmt: skip
def test_a_folder_without_data(
    content: dict[str, str] | None, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    assert init.main([str(folder), "--output", str(tmp_path / "run.yaml")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run.yaml").exists()


def test_a_file_over_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("preset: debug\nmodel: {n_routed_experts: 16}\nschedule: {total_tokens: 2e6}\n")
    found, preset = load_config(str(path)), load_config("debug")
    assert found.model == preset.model.model_copy(update={"n_routed_experts": 16})
    assert found.schedule.bias_rate[0].until_tokens == 1_600_000
    assert found.corpus == preset.corpus
    path.write_text("preset: debgu\n")
    with pytest.raises(ConfigError, match="preset 'debgu' is none of debug"):
        load_config(str(path))


def test_the_console_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main.main(["--help"]) == 0
    usage = capsys.readouterr().out
    for name in [*main.COMMANDS, *stages.names()]:
        assert f"\n  {name} " in usage
        monkeypatch.setattr(sys, "argv", ["/usr/bin/moonlight"])
        with pytest.raises(SystemExit) as ended:
            main.main([name, "--help"])
        assert ended.value.code == 0
        shown = {"run": "pipeline"}.get(name, name)
        assert f"usage: moonlight {shown}" in capsys.readouterr().out
    assert main.main([]) == 2
    assert main.main(["pepare"]) == 2
    assert "no command 'pepare'; commands are init, check, data, run" in capsys.readouterr().err


def test_formats_are_told_of_the_files_that_were_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_text(tmp_path)
    monkeypatch.setattr("data_prep.look.JUDGED", 100)
    monkeypatch.chdir(tmp_path.parent)
    assert init.main([str(tmp_path), "--output", str(tmp_path / "run.yaml")]) == 0
    assert "120 files (of the first 100: 100 text), " in capsys.readouterr().out
