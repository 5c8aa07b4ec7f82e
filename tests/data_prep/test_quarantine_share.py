"""A source of which too much cannot be used stops prepare, with the reasons; at its end if it is small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep import attempts
from data_prep.plan import Unit
from data_prep.prepare import prepare
from data_prep.quarantine_share import QuarantineShare
from data_prep.records import UnitManifest
from data_prep.tokenize_unit import TokenizeSettings
from pipeline.config.load import ConfigError, load_config
from pipeline.config.schema import RunConfig
from pipeline.storage import open_storage


def config(tmp_path: Path, bad: int, *more: str) -> RunConfig:
    """Forty documents of which `bad` have no text."""
    lines = [{"text": f"Page {n}. " + "The moon rose late. " * 20} if n >= bad else {"body": 1} for n in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    corpus = {"sources": [{"name": "web", "path": str(tmp_path / "a.jsonl")}], "max_quarantined_fraction": 0.25}
    small = ['tokenizer={"vocab_size": 300, "training_bytes": 10000}', "model.vocab_size=300"]
    return load_config("debug", [f"storage.root={tmp_path / 'root'}", f"corpus={json.dumps(corpus)}", *small, *more])


def test_up_to_the_limit_it_goes_on(tmp_path: Path) -> None:
    found = config(tmp_path, 10)
    assert prepare(found, open_storage(found.storage)).sources[0].counts.quarantined == {"missing_field": 10}


def test_past_the_limit_it_stops_and_again_it_stops(tmp_path: Path) -> None:
    found = config(tmp_path, 11)
    for _ in range(2):  # the second time the units are there already
        with pytest.raises(
            ConfigError, match=r"of the first 40 documents of source 'web' 11 cannot be used \(missing_field 11\)"
        ):
            prepare(found, open_storage(found.storage))
    raised = config(tmp_path, 11, "corpus.max_quarantined_fraction=0.3")
    assert prepare(raised, open_storage(raised.storage)).sources[0].counts.docs_out > 0


def test_a_large_source_is_judged_before_its_end(tmp_path: Path) -> None:
    share = QuarantineShare(config(tmp_path, 0).corpus.sources, 0.25)
    unit = {"source": "web", "failed": "", "counts": {"docs_in": 600, "quarantined": {"invalid_json": 200}}}
    share.add(unit)
    with pytest.raises(ConfigError, match=r"400 cannot be used \(invalid_json 400\); correct corpus.sources\[0\]"):
        share.add(unit)


def test_units_that_kill_their_workers_are_more_than_a_record_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of four units are two records beside 80 documents, and half of the text."""
    (tmp_path / "web").mkdir()
    text = "The moon rose late. " * 20
    for part in range(4):
        lines = [json.dumps({"text": f"Page {part}-{n}. {text}"}) + "\n" for n in range(40)]
        (tmp_path / "web" / f"{part}.jsonl").write_text("".join(lines))

    def found(limit: float) -> RunConfig:
        sources = [{"name": "web", "path": str(tmp_path / "web")}]
        corpus = {"sources": sources, "max_quarantined_fraction": limit, "unit_bytes": 15_000}
        small = ['tokenizer={"vocab_size": 300, "training_bytes": 10000}', "model.vocab_size=300", "data.max_padding=1"]
        return load_config("debug", [f"storage.root={tmp_path / 'root'}", f"corpus={json.dumps(corpus)}", *small])

    def guarded(settings: TokenizeSettings, unit: Unit) -> UnitManifest:
        if unit.slices[0].path > "1.jsonl":
            return attempts.tokenize_guarded(settings, unit)
        return attempts._quarantine(storage, settings, unit, "killed its worker")

    storage = open_storage(found(0.4).storage)
    monkeypatch.setattr("data_prep.prepare.tokenize_guarded", guarded)
    for _ in range(2):
        with pytest.raises(
            ConfigError, match=r"2 of the 4 units of source 'web' cannot be used \(unit [0-9a-f]{32} killed"
        ):
            prepare(found(0.4), storage)
    assert len(prepare(found(0.5), storage).sources[0].failed_units) == 2
    monkeypatch.undo()
    storage.delete("datasets/units")  # as the message advises: they are tried again
    for entry in storage.list("datasets"):
        if entry.path.endswith("dataset.json"):
            storage.delete(entry.path)
    assert prepare(found(0.4), storage).sources[0].counts.quarantined == {}
