"""Scores without the questions that were in the corpus: the harness's own, asked of these alone."""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lm_eval.evaluator import simple_evaluate

from pipeline.evaluation.harness import RESAMPLES, SEEDS, score_tasks, task_scores
from pipeline.evaluation.heldout import evaluate
from pipeline.evaluation.questions import key_of
from pipeline.evaluation.tasks import loaded
from pipeline.evaluation.unseen import seen_questions
from pipeline.manifest import Contamination, EvaluationManifest, FileEntry, NearDuplicatesFound, TaskContamination
from pipeline.model.shapes import count_parameters
from pipeline.publishing.model_card import model_card
from pipeline.report.page import render
from pipeline.tokenizer import Encoder
from tests.evaluation.make import MadeRun
from tests.evaluation.make_exams import ASKED, EXAMS, SEEN, write_exams
from tests.evaluation.test_harness import ours
from tests.publishing.conftest import PublishedRun
from tests.report.make import run_of

GROUP = "exams"


@pytest.fixture(scope="module")
def contaminated(run: PublishedRun, tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    """The run with three exams, of which its corpus held questions: half of those of two, all of the third."""
    root, made = tmp_path_factory.mktemp("exams"), run.made
    own = write_exams(root / "own", root / "cache")
    section = made.config.evaluation.model_copy(update={"tasks": (GROUP, "exam_free"), "task_folder": str(own)})
    config = made.config.model_copy(update={"evaluation": section})
    rows = []
    with loaded(config) as (manager, found):
        for name, task in manager.load(found)["tasks"].items():
            numbers = range(ASKED) if name == "exam_free" else SEEN
            documents = list(task.eval_docs)
            rows += [{"task": name, "key": key_of(documents[number]), "documents": 1} for number in numbers]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    data = buffer.getvalue()
    made.storage.write("datasets/made/seen.parquet", data)
    entry = FileEntry(path="datasets/made/seen.parquet", bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    tasks = {name: TaskContamination(questions=ASKED, looked_for=ASKED, seen=4, documents=9) for name in EXAMS}
    found = Contamination(rule="ngram", ngram=13, action="report", questions=entry, seen=entry, tasks=tasks)
    return replace(made, config=config, dataset=made.dataset.model_copy(update={"contamination": found}))


@pytest.fixture(scope="module")
def evaluation(contaminated: MadeRun) -> EvaluationManifest:
    made = contaminated
    return evaluate(made.config, made.dataset, made.checkpoint, made.storage, report=lambda _: None)


def test_as_the_harness_scores_the_others_alone(
    run: PublishedRun, contaminated: MadeRun, evaluation: EvaluationManifest
) -> None:
    left = [number for number in range(ASKED) if number not in SEEN]
    with loaded(contaminated.config) as (manager, tasks):
        samples = {name: left for name in manager.load(tasks)["tasks"] if name != "exam_free"}
        alone = simple_evaluate(
            ours(run), tasks=tasks[:1], task_manager=manager, samples=samples, bootstrap_iters=RESAMPLES, **SEEDS
        )
    expected = task_scores(alone)
    assert set(expected) == {GROUP, "exam_choice", "exam_cloze"}
    for name, score in expected.items():
        found = evaluation.tasks[name]
        assert found.unseen == score.metrics
        assert found.unseen_documents == score.documents
        assert found.documents == 2 * score.documents
        assert found.metrics != found.unseen or name != "exam_cloze"  # perplexities differ
    nothing_left = evaluation.tasks["exam_free"]
    assert (nothing_left.unseen_documents, nothing_left.unseen) == (0, ())


def test_no_process_is_forked_for_standard_errors(
    contaminated: MadeRun, evaluation: EvaluationManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is forked from a process with threads may wait for ever for a lock that one of them held."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pool of processes")

    monkeypatch.setattr("multiprocessing.Pool", refuse)
    made = contaminated
    seen = seen_questions(made.dataset, made.storage)
    encoder = Encoder.stored(made.dataset.tokenizer, made.storage)
    found = score_tasks(made.config, made.model, encoder, lambda _: None, seen)
    assert found.scores == evaluation.tasks
    assert "DISABLE_MULTIPROC" not in os.environ


def test_where_nobody_looked_nothing_is_said(contaminated: MadeRun) -> None:
    made = contaminated
    plain = made.dataset.model_copy(update={"contamination": None})
    assert seen_questions(plain, made.storage) is None
    found = score_tasks(made.config, made.model, Encoder.stored(plain.tokenizer, made.storage), lambda _: None)
    assert all(score.unseen_documents is None and not score.unseen for score in found.scores.values())
    assert "unseen" not in found.scores["exam_free"].model_dump_json(exclude_defaults=True)


def test_the_page_says_what_rules_did(run: PublishedRun) -> None:
    first, *others = run.made.dataset.sources
    told = first.model_copy(update={"changes": {"c4.lines": 1234}, "languages": {"de": 1, "en": 3}})
    entry = FileEntry(path="a", bytes=0, sha256="")
    near = NearDuplicatesFound(duplicates=entry, clusters=entry, count=5, dropped=6789)
    dataset = run.made.dataset.model_copy(update={"sources": (told, *others), "near_duplicates": near})
    page = render(run_of(run, dataset=dataset))
    for text in ("c4.lines", "1,234", "en 75.0%, de 25.0%", "5 clusters; 6,789 documents"):
        assert text in page
    assert "Near-duplicates" not in render(run_of(run))


def test_card_and_page_say_it(run: PublishedRun, contaminated: MadeRun, evaluation: EvaluationManifest) -> None:
    made = contaminated
    parameters = count_parameters(made.config.model)
    card = model_card(made.config, made.dataset, made.train, made.checkpoint, evaluation, parameters, [])
    page = render(run_of(run, dataset=made.dataset, evaluation=evaluation))
    value = evaluation.tasks[GROUP].unseen[0].shown
    assert f"| exams | N/A | 0 | 16 | acc | {evaluation.tasks[GROUP].metrics[0].shown} | 8 | {value} |" in card
    assert f">{value}<" in page
    for text in (card, page):
        assert "not in the corpus" in text
        assert "exam_cloze" in text
    assert "| exam_cloze | 8 | 8 | 4 | 9 |" in card
    assert "13-gram" in card
    assert "left in" in card
