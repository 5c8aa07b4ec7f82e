"""`moonlight data sample`: counts of every threshold, with examples, of documents spread over the files; clusters over sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.main import main

PROSE = "Nobody of the {} crew knew that the tide would turn with the moon, and so they had to be patient until {} came back from the shore."


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    web = [
        "\n".join(PROSE.format(n * 7 + line, line * n) for line in range(3)) + f" keeper{n}@lamp.example.org"
        for n in range(30)
    ]
    web += ["def f(): return 1\n" * 40, "short", web[4] + " once more"]
    folder = tmp_path / "web"
    folder.mkdir()
    for part in range(4):
        lines = [json.dumps({"text": text}) for text in web[part::4]]
        (folder / f"{part}.jsonl").write_text("\n".join([*lines, "no json"]) + "\n")
    (tmp_path / "plain.jsonl").write_text(json.dumps({"text": web[4]}) + "\n")
    sources = [{"name": "web", "path": str(folder), "rules": {"gopher_quality": True, "personal_data": True}}]
    sources += [{"name": "plain", "path": str(tmp_path / "plain.jsonl")}]
    corpus = {"sources": sources, "near_duplicates": {"n_gram": 3}, "max_dropped_fraction": 1.0}
    return [
        "data",
        "sample",
        "--config",
        "debug",
        "--examples",
        "2",
        f"storage.root={tmp_path / 'root'}",
        f"corpus={json.dumps(corpus)}",
    ]


def test_every_threshold_is_shown_with_examples(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(arguments) == 0
    told = capsys.readouterr().out
    lines = [line for line in told.splitlines() if "looking at" not in line]
    assert lines[0] == "source web: 37 documents of 4 of 4 files"
    assert lines[1] == "  quarantined: invalid_json 4"
    assert lines[3].split() == ["gopher_quality", "(if", "it", "were", "alone)", "2", "6.1%"]
    thresholds = [line.split() for line in lines if line.startswith("    gopher_quality.")]
    assert [counts for _, *counts in thresholds] == [["1", "3.0%"], ["1", "3.0%"]]
    assert thresholds[-1][0] == "gopher_quality.min_words"
    assert any(line.startswith("      ") and line.endswith("  short") for line in lines)
    assert "  kept: 31 (93.9%)" in lines
    assert "  changed in them: personal_data.email 31" in lines
    assert "source plain: 1 documents of 1 of 1 files" in lines
    assert any(line.startswith("  it has no rules; these are what all of them would do") for line in lines)
    assert any(line.startswith("near-duplicates among the ") and "not set" not in line for line in lines)
    assert not (tmp_path / "root").exists() or not list((tmp_path / "root").rglob("*.*"))


def test_what_is_asked_for(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["data", "--config", "debug", "rules"])
    assert error.value.code == 2
    assert "rules is asked for; ask for sample" in capsys.readouterr().err
    assert main([*arguments, "corpus.sources.0.path=/nowhere"]) == 2
