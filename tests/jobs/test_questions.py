"""The questions of a run's tasks: asked of the harness once, found in the corpus, and what is said where they cannot be read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_prep.prepare import prepare
from jobs import stages
from jobs.data import main as data_main
from jobs.stage import main as stage_main
from jobs.stages import questions
from jobs.stages.prepare import outcome
from jobs.stages.records import Records, dataset_identity, hold_dataset
from pipeline.config.load import ConfigError, load_config
from pipeline.config.schema import RunConfig
from pipeline.evaluation.questions import key_of
from pipeline.file_index import open_index
from pipeline.integrity import read_checked
from pipeline.manifest import DatasetManifest
from pipeline.storage import Storage, open_storage
from pipeline.training.commits import train_folder
from tests.evaluation.make_exams import ASKED, EXAMS, SEEN, question, write_corpus, write_exams

pytestmark = pytest.mark.usefixtures("no_ray")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    return write_exams(tmp_path / "own", tmp_path / "cache")


def arguments(own: Path, *more: str, **section: Any) -> list[str]:
    source = {"name": "web", "path": str(own.parent / "corpus"), "max_epochs": 1000}
    corpus = {"sources": [source], "heldout_fraction": 0.0, "decontamination": section}
    return [
        f"storage.root={own.parent / 'root'}",
        "corpus=" + json.dumps(corpus),
        f"evaluation.task_folder={own}",
        'tokenizer={"vocab_size": 600, "training_bytes": 50000}',
        "model.vocab_size=600",
        "data.rows_per_group=1",
        "data.max_padding=1.0",
        'evaluation.tasks=["exams"]',
        "schedule.total_tokens=20000",
        *more,
    ]


def made(own: Path, *more: str, **section: Any) -> tuple[RunConfig, Storage]:
    config = load_config("debug", arguments(own, *more, **{"tasks": ["exam_free"], **section}))
    return config, open_storage(config.storage)


def prepared(config: RunConfig, storage: Storage) -> DatasetManifest:
    return prepare(questions.pin(config, storage), storage)


@pytest.mark.parametrize("action", ["drop", "cut", "report"])
def test_planted_questions_are_found_and_dealt_with(own: Path, action: str) -> None:
    config, storage = made(own, "corpus.keep_rejected=true", action=action)
    dataset = prepared(config, storage)
    found = dataset.contamination
    assert found is not None
    assert found.tasks.keys() == set(EXAMS)
    for exam in EXAMS:
        told = found.tasks[exam]
        assert (told.questions, told.looked_for, told.seen, told.documents) == (ASKED, ASKED, len(SEEN), len(SEEN))
    read_checked(storage, found.seen)
    seen = pq.read_table(storage.key(found.seen.path)).to_pylist()
    rows = {exam: [json.loads(line) for line in (own / f"{exam}.jsonl").read_text().splitlines()] for exam in EXAMS}
    assert {(row["task"], row["key"]) for row in seen} == {
        (exam, key_of(rows[exam][number])) for exam in EXAMS for number in SEEN
    }
    (source,) = dataset.sources
    assert source.contaminated == dict.fromkeys(EXAMS, len(SEEN))
    dropped = {name: count for name, count in source.counts.filtered.items() if name.startswith("decontamination.")}
    assert dropped == ({f"decontamination.{exam}": len(SEEN) for exam in EXAMS} if action == "drop" else {})
    assert source.changes == ({"decontamination.cut": 12} if action == "cut" else {})
    kept = open_index(storage, dataset).rejected[0]
    if action == "drop":
        texts = pq.read_table(storage.key(kept[0].path))["text"].to_pylist()
        assert sum(question(EXAMS[0], 0) in text for text in texts) == 1
    assert "; questions of tasks, " in outcome(dataset)
    assert "exam_free 4 of 8 in 4 documents" in outcome(dataset)
    # without it, other documents: it is part of the dataset's identity
    plain, _ = made(own)
    plain = plain.model_copy(update={"corpus": plain.corpus.model_copy(update={"decontamination": None})})
    assert dataset_identity(plain, storage) != dataset.identity
    assert (prepare(plain, storage).tokens == dataset.tokens) is (action == "report")


def test_a_run_that_goes_on_needs_no_data_of_its_tasks(own: Path) -> None:
    config, storage = made(own)
    first = prepared(config, storage)
    assert stages.find(config, storage).dataset == first
    (own / "exam_free.jsonl").unlink()
    shutil.rmtree(own.parent / "cache")
    # an edited task is another one, and it is asked again, as long as nothing is trained on what the first one left
    assert not stages.find(config, storage).done("prepare")
    with pytest.raises(ConfigError, match=r"^corpus\.decontamination\.tasks: exam_free cannot be loaded"):
        questions.pin(config, storage)
    hold_dataset(questions.pinned(config, storage), storage, first)
    storage.write(f"{train_folder(config.run_id)}/step-00000001/manifest.json", b"{}")
    assert questions.pin(config, storage).corpus.decontamination.questions is not None
    assert stages.find(config, storage, "train").dataset == first
    assert prepared(config, storage) == first


def test_an_edited_task_redoes_what_it_touches(own: Path) -> None:
    config, storage = made(own)
    first = prepared(config, storage)
    data = own / "exam_free.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[0]["question"] = question(EXAMS[0], 7)  # which is nowhere
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    second = prepared(config, storage)
    assert second.identity != first.identity
    assert second.contamination is not None
    assert second.contamination.tasks["exam_free"].seen == len(SEEN) - 1
    assert second.sources[0].counts.docs_out == first.sources[0].counts.docs_out + 1
    (own / "notes.txt").write_text("of no task")  # other content of the folder: asked again, the same answer
    assert prepared(config, storage) == second


@pytest.mark.parametrize(
    ("more", "section", "message"),
    [
        ([], {"rule": "ngram", "min_covered": 0.5}, r"corpus\.decontamination.*min_covered 0\.5 belongs to rule span"),
        ([], {"action": "drop", "window": 10}, r"corpus\.decontamination.*window belongs to action cut, and action is drop"),
        ([], {"min_words": 14}, r"corpus\.decontamination.*min_words 14 is over ngram 13"),
        ([], {"tasks": ["exams"]}, r"corpus\.decontamination\.tasks: 'exams' is in evaluation\.tasks"),
        (["evaluation.tasks=[]"], {}, r"corpus\.decontamination: there is no task whose questions to look for"),
        ([], {"tasks": ["broken"]}, r"corpus\.decontamination\.tasks: the questions of broken cannot be read .*nothing"),
        ([], {"tasks": ["gone"]}, r"corpus\.decontamination\.tasks: gone cannot be loaded .*evaluation\.task_folder"),
        ([], {"questions": "0" * 64}, r"corpus\.decontamination\.questions 0{64}: not at .*; leave it out"),
    ],
)  # fmt: skip
def test_refused_before_anything_starts(
    own: Path, capsys: pytest.CaptureFixture[str], more: list[str], section: dict[str, Any], message: str
) -> None:
    text = (own / "exam_free.yaml").read_text()
    (own / "broken.yaml").write_text(
        text.replace("task: exam_free", "task: broken").replace(
            "{{question}}", "{{question if answer.startswith(0|string) else nothing + 1}}"
        )
    )
    (own / "gone.yaml").write_text(
        text.replace("task: exam_free", "task: gone").replace("exam_free.jsonl", "gone.jsonl")
    )
    assert stage_main("prepare", ["--config", "debug", *arguments(own, *more, **section)]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, told[-1]), told
    assert not any((own.parent / "root").rglob("*.json"))


def test_a_source_that_is_a_copy_of_a_task_stops(own: Path) -> None:
    lines = [json.dumps({"text": question("exam_free", number)}) for number in range(ASKED)]
    (own.parent / "corpus" / "a.jsonl").write_text("\n".join(lines))
    config, storage = made(own, "corpus.max_dropped_fraction=0.5")
    with pytest.raises(
        ConfigError, match=r"^corpus.max_dropped_fraction 0.5: questions of task exam_free are in 8 of the first 8"
    ):
        prepared(config, storage)


def test_conversations_are_looked_through_by_what_is_said(own: Path) -> None:
    from data_prep.tokenize_unit import said

    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    assert said(json.dumps(talk).encode()) == "Why?\nSo."


def test_nothing_is_asked_where_nothing_is_looked_for(own: Path) -> None:
    config, storage = made(own)
    config = config.model_copy(update={"corpus": config.corpus.model_copy(update={"decontamination": None})})
    assert questions.pin(config, storage) is config
    assert stages.find(config, storage) == Records()
    assert storage.list("runs") == []


def test_sample_shows_them_beforehand(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_main(["sample", "--config", "debug", *arguments(own, tasks=["exam_free"], action="cut")]) == 0
    shown = capsys.readouterr().out
    assert "documents with questions of tasks (cut):\n" in shown
    for exam in EXAMS:
        (line,) = (line for line in shown.splitlines() if line.strip().startswith(exam))
        assert line.split()[1:] == ["4", "10.0%"]
    assert not (own.parent / "root").exists()
