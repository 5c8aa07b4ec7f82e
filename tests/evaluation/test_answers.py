"""Answers that the tokenizer joins with what stands before them, and scores over nothing: as lm-eval's own model, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM

from pipeline.config.load import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.evaluation.forward import Forward
from pipeline.evaluation.harness import SEEDS, HarnessModel, task_scores
from pipeline.evaluation.heldout import evaluate
from pipeline.evaluation.tasks import loaded
from pipeline.tokenizer import Encoder
from tests.evaluation.make import SEQUENCE, MadeRun
from tests.evaluation.test_harness import asked, ignore, ours, theirs
from tests.model.oracle import random_model
from tests.publishing.conftest import PublishedRun

Question = tuple[str, list[str]]
CHINESE: list[Question] = [
    ("夜里月亮", ["升起来了。她睡了。", "落下去了。", "升起来了。天亮了"]),
    ("月亮", ["升起来了。它照亮了路。", "落了。", "很圆。"]),
    ("路上的房子", ["后面有月亮升起来了。", "月亮", "里"]),
]
ENGLISH: list[Question] = [
    ("The moon ro", ["se late.", "ck", "of and the field"]),
    ("def area(wid", ["th, height):", "e):", "th) ->"]),
    ("It lit the r", ["oad, the field", "iver", "oads"]),
]
SPACED: list[Question] = [("The moon ", ["rose late.", "is here", " lit"]), ("It lit  ", ["the road", "x", "  it"])]
SWALLOWED: dict[str, list[Question]] = {
    "swallowed": [*CHINESE, ("月亮升", ["起来了", "落下去了。", "起来"])],
    "cut_words": [("def area(wid", ["th)", "e):"])],
}


def write_questions(folder: Path, name: str, questions: list[Question], **settings: Any) -> None:
    lines = [json.dumps({"question": text, "choices": choices, "answer": 0}) + "\n" for text, choices in questions]
    (folder / f"{name}.jsonl").write_text("".join(lines))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}, "cache_dir": str(folder / ".cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": metric} for metric in ("acc", "acc_norm")],
        **settings,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


@pytest.fixture(scope="module")
def config(run: PublishedRun, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("answers")
    write_questions(folder, "chinese", CHINESE)
    write_questions(folder, "english", ENGLISH)
    write_questions(folder, "spaced", SPACED)
    for name, questions in SWALLOWED.items():
        write_questions(folder, name, questions)
    write_questions(folder, "nothing", ENGLISH, process_docs="!function nothing.none")
    quoted = (folder / "nothing.yaml").read_text()
    (folder / "nothing.yaml").write_text(quoted.replace("'!function nothing.none'", "!function nothing.none"))
    (folder / "nothing.py").write_text("def none(documents):\n    return documents.select([])\n")
    section = run.made.config.evaluation.model_copy(update={"task_folder": str(folder), "few_shot": 0})
    return run.made.config.model_copy(update={"evaluation": section})


def with_task(config: RunConfig, name: str) -> RunConfig:
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"tasks": (name,)})})


def samples(config: RunConfig, name: str, model: HarnessModel | HFLM) -> list[Any]:
    with loaded(with_task(config, name)) as (manager, tasks):
        results = simple_evaluate(
            model, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True, cache_requests=False, **SEEDS
        )
    found = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return [(list(one["filtered_resps"]), one["acc"], one["acc_norm"]) for one in found]


@pytest.mark.parametrize("name", ["chinese", "english", "spaced"])
def test_joined_answers_are_chosen_as_lm_eval_chooses(run: PublishedRun, config: RunConfig, name: str):
    found, expected = samples(config, name, ours(run)), samples(config, name, theirs(run, eos_first=True))
    assert len(found) > 1
    for (scores, *chosen), (their_scores, *their_chosen) in zip(found, expected, strict=True):
        assert [score for score, _ in scores] == pytest.approx([score for score, _ in their_scores], abs=1e-4)
        assert [greedy for _, greedy in scores] == [greedy for _, greedy in their_scores]
        assert chosen == their_chosen
        assert np.argmax([score for score, _ in scores]) == np.argmax([score for score, _ in their_scores])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swallowed", "swallowed has 2 answers without a token of their own, such as '起来了' after '月亮升'"),
        ("cut_words", "cut_words has 1 answers without a token of their own, such as 'th\\)' after 'def area\\(wid'"),
    ],
)
def test_answers_that_are_swallowed_are_refused_by_name(run: PublishedRun, config: RunConfig, name: str, message: str):
    """Where lm-eval's own model ends in an assertion or an index."""
    with pytest.raises((AssertionError, IndexError)):
        samples(config, name, theirs(run, eos_first=True))
    with pytest.raises(ValueError, match=rf"^evaluation.tasks: {message}.*another target_delimiter"):
        samples(config, name, ours(run))


@pytest.mark.parametrize("pair", [("", ""), ("The moon", ""), ("月亮升", "起来了")])
def test_an_answer_of_nothing_is_refused(run: PublishedRun, pair: tuple[str, str]):
    with pytest.raises(ValueError, match=r"^evaluation.tasks: t has 1 answers without a token of their own"):
        ours(run).loglikelihood(asked(("The moon", " rose"), pair))


def test_a_task_without_documents_is_refused_by_name(run: PublishedRun, config: RunConfig):
    with pytest.raises(ConfigError, match=r"^evaluation.tasks: nothing cannot be loaded"):
        samples(config, "nothing", ours(run))


def test_a_task_of_empty_texts_is_not_predicted_perfectly(run: PublishedRun):
    model = ours(run)
    assert model.loglikelihood_rolling(asked(("",), ("x = 1",)))[0] == 0.0  # adds nothing to the others
    with pytest.raises(ValueError, match=r"^evaluation.tasks: all texts of t are empty"):
        model.loglikelihood_rolling(asked(("",), ("",)))


def test_a_prompt_without_room_is_refused(run: PublishedRun):
    for count in (SEQUENCE, SEQUENCE + 1):
        with pytest.raises(
            ValueError, match=rf"sequence_length: {SEQUENCE} tokens hold no prompt beside {count} generated"
        ):
            ours(run).generate_until(asked(("The moon", {"until": [], "max_gen_toks": count})))


@pytest.fixture(scope="module")
def broken(run: PublishedRun) -> HarnessModel:
    """A network whose numbers are none."""
    model = random_model(run.made.config.model).eval().requires_grad_(False)
    model.layers[1].input_layernorm.weight.fill_(float("nan"))
    encoder = Encoder.load("tokenizers/t", run.made.storage)
    return HarnessModel(Forward(model, encoder, batch=3, report=ignore), encoder, SEQUENCE)


def test_a_network_without_numbers_chooses_nothing(broken: HarnessModel):
    with pytest.raises(ValueError, match="2 of 2 log-likelihoods are not finite"):
        broken.loglikelihood(asked(("The moon", " rose"), ("The moon", " set")))
    with pytest.raises(ValueError, match="1 of 1 log-likelihoods are not finite"):
        broken.loglikelihood_rolling(asked(("x = 1",)))
    with pytest.raises(ValueError, match="2 of 2 prompts' next tokens are not finite"):
        broken.generate_until(asked(*((text, {"until": [], "max_gen_toks": 4}) for text in ("The moon", "x"))))


def test_a_checkpoint_without_numbers_has_no_evaluation(made: MadeRun, monkeypatch: pytest.MonkeyPatch):
    model = random_model(made.config.model).eval().requires_grad_(False)
    model.norm.weight.fill_(float("nan"))
    monkeypatch.setattr("pipeline.evaluation.heldout.load_model", lambda *_: model)
    config = made.config.model_copy(update={"run_id": "broken"})
    with pytest.raises(
        ValueError, match=r"checkpoint of step 50: the held-out loss of source 'code' is nan.*evaluate an earlier"
    ):
        evaluate(config, made.dataset, made.checkpoint, made.storage, report=ignore)
    assert not made.storage.list("runs/broken")


def test_metrics_of_numpy_are_numbers_and_the_rest_is_none():
    values = {"a,none": np.float32(0.5), "b,none": np.int64(2), "c,none": float("nan"), "d,none": "N/A", "e,none": True}
    results: dict[str, Any] = {
        "results": {"t": {"alias": "t", "sample_len": 3, **values}},
        "group_subtasks": {},
        "higher_is_better": {},
        "n-shot": {"t": 0},
        "versions": {"t": 1},
    }
    found = {metric.name: metric.value for metric in task_scores(results)["t"].metrics}
    assert found == {"a": 0.5, "b": 2.0, "c": None, "d": None, "e": 1.0}
