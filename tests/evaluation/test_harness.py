"""Our network as lm-eval sees it, against lm-eval's own model of the published Hugging Face folder."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from pipeline.config.schema import ParallelismConfig, RunConfig
from pipeline.evaluation.forward import Forward
from pipeline.evaluation.harness import SEEDS, HarnessModel, task_scores
from pipeline.evaluation.heldout import evaluate
from pipeline.evaluation.result import identity
from pipeline.evaluation.tasks import loaded
from pipeline.manifest import EvaluationManifest, digest_of
from pipeline.publishing.export import publish
from pipeline.publishing.registry import folder
from pipeline.publishing.version import published_config
from pipeline.report.page import render
from pipeline.storage import Storage
from pipeline.tokenizer import Encoder
from tests.distributed import run_distributed
from tests.evaluation.make import SEQUENCE
from tests.evaluation.make_tasks import NEW_TOKENS, TASKS, write_tasks
from tests.evaluation.test_heldout import ranks_evaluate
from tests.publishing.conftest import PublishedRun
from tests.report.make import run_of

SHOTS = 2
LONG = "The field and the 17 houses behind it. " * 8


def ignore(_: object) -> None:
    pass


@pytest.fixture(scope="module")
def config(run: PublishedRun, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The run's, with tasks."""
    root = tmp_path_factory.mktemp("tasks")
    return with_tasks(run.made.config, task_folder=str(write_tasks(root / "own", root / "cache")))


def with_tasks(config: RunConfig, **settings: object) -> RunConfig:
    section = config.evaluation.model_copy(update={"tasks": TASKS, "few_shot": SHOTS, **settings})
    return config.model_copy(update={"evaluation": section})


@pytest.fixture(scope="module")
def evaluation(run: PublishedRun, config: RunConfig) -> EvaluationManifest:
    made = run.made
    return evaluate(config, made.dataset, made.checkpoint, made.storage, report=ignore)


def theirs(run: PublishedRun, *, eos_first: bool) -> HFLM:
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    if eos_first:  # as documents begin in training
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="[EOS] $A", special_tokens=[("[EOS]", tokenizer.eos_token_id)]
        )
    return HFLM(
        str(run.folder), tokenizer=tokenizer, device="cpu", dtype="float32", max_length=SEQUENCE,
        prefix_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def ours(run: PublishedRun, batch: int = 3) -> HarnessModel:
    encoder = Encoder.load("tokenizers/t", run.made.storage)
    return HarnessModel(Forward(run.made.model, encoder, batch=batch, report=ignore), encoder, SEQUENCE)


def asked(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each, task_name="t") for each in arguments]


PAIRS = [
    ("The moon", " rose late"),
    ("", "def area(width"),
    ("Ein Satz mit ", "Umlauten: äöüß"),
    ("return ", "w"),
    ("return ", "x"),
    ("return", " width * height"),
    (LONG, " 月亮升起来了。"),
    (LONG + LONG, " x"),
    ("x", LONG[:90]),
]


@pytest.mark.parametrize("batch", [1, 4])
def test_log_likelihoods_and_greedy_flags(run: PublishedRun, batch: int):
    expected = theirs(run, eos_first=True).loglikelihood(asked(*PAIRS), disable_tqdm=True)
    found = ours(run, batch).loglikelihood(asked(*PAIRS))
    assert [log_p for log_p, _ in found] == pytest.approx([log_p for log_p, _ in expected], abs=1e-4)
    assert [flag for _, flag in found] == [flag for _, flag in expected]


def test_what_the_model_would_say_is_flagged_as_greedy(run: PublishedRun):
    prompts = ["The moon", "def area(", "x", "for i in", "houses", "Ein ", "17 ", "print"]
    said = ours(run).generate_until(asked(*((prompt, {"until": [], "max_gen_toks": 1}) for prompt in prompts)))
    pairs = asked(*zip(prompts, said))
    expected = [flag for _, flag in theirs(run, eos_first=True).loglikelihood(pairs, True)]
    assert [flag for _, flag in ours(run).loglikelihood(pairs)] == expected
    assert any(expected)  # not all: what was said may be tokenized as one with the prompt's end


def test_rolling_log_likelihoods(run: PublishedRun):
    texts = asked(("The moon rose late.",), (LONG,), ("",), ("äöüß 月" * 30,))
    expected = theirs(run, eos_first=False).loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours(run).loglikelihood_rolling(texts) == pytest.approx(expected, abs=1e-4)


def test_generations(run: PublishedRun):
    free = {"until": [], "max_gen_toks": 12}
    prompts = ["The moon", "def area(", "x", LONG]
    whole = ours(run).generate_until(asked(*((prompt, free) for prompt in prompts)))
    stop = whole[0][3:5]  # a text that comes
    kinds = [free, {"until": [stop, "\n"], "max_gen_toks": 12, "do_sample": False}, {"until": stop}]
    kinds[2]["max_gen_toks"] = SEQUENCE - 4  # prompts of four tokens at most
    requests = asked(*((prompt, kind) for kind in kinds for prompt in prompts))
    expected = theirs(run, eos_first=True).generate_until(requests, disable_tqdm=True)
    assert ours(run).generate_until(requests) == expected
    assert expected[4] == whole[0][:3]


def test_task_results_are_those_of_lm_eval_on_the_published_folder(
    run: PublishedRun, config: RunConfig, evaluation: EvaluationManifest
):
    expected = {}
    with loaded(config) as (manager, tasks):
        for task in tasks:
            model = theirs(run, eos_first=getattr(task, "OUTPUT_TYPE", "") != "loglikelihood_rolling")
            results = simple_evaluate(
                model, tasks=[task], task_manager=manager, num_fewshot=SHOTS, bootstrap_iters=1000, **SEEDS
            )
            expected |= task_scores(results)
    assert evaluation.harness.startswith("lm-eval 0.4")
    assert evaluation.tasks.keys() == expected.keys() == {"night_sums", "sums", "more_sums", "continue_code", "prose"}
    for name, score in expected.items():
        found = evaluation.tasks[name]
        assert found.model_copy(update={"metrics": ()}) == score.model_copy(update={"metrics": ()})
        assert [metric.name for metric in found.metrics] == [metric.name for metric in score.metrics] != []
        for ours_, theirs_ in zip(found.metrics, score.metrics):
            assert ours_.value == pytest.approx(theirs_.value, rel=1e-4)
            assert (ours_.stderr or 0) == pytest.approx(theirs_.stderr or 0, rel=1e-4)
    sums = evaluation.tasks["sums"]
    assert (sums.version, sums.few_shot, sums.documents, sums.group) == ("2.0", SHOTS, 9, "night_sums")
    group = evaluation.tasks["night_sums"]
    assert (group.version, group.few_shot, group.documents, group.group) == ("3.0", SHOTS, 15, None)
    assert [metric.higher_is_better for metric in evaluation.tasks["prose"].metrics] == [False] * 3


def test_two_ranks_of_a_sharded_model_get_the_same_results(
    run: PublishedRun, config: RunConfig, evaluation: EvaluationManifest
):
    made = run.made
    mesh = ParallelismConfig(shard=2, ep=2)
    config = config.model_copy(update={"parallelism": mesh, "run_id": "ranks"})
    found = run_distributed(ranks_evaluate, 2, replace(made, config=config, model=None))
    assert found[0] == found[1]
    assert found[0].tasks.keys() == evaluation.tasks.keys()
    for name, score in evaluation.tasks.items():
        values = [metric.value for metric in found[0].tasks[name].metrics]
        assert values == pytest.approx([metric.value for metric in score.metrics], rel=1e-5)


def test_an_answer_that_no_window_holds_is_refused(run: PublishedRun):
    with pytest.raises(
        ValueError, match=r"^evaluation.sequence_length: 64 tokens do not hold an answer of \d+; raise it"
    ):
        ours(run).loglikelihood(asked(("x", LONG)))


def test_results_are_in_the_card_and_the_report(run: PublishedRun, config: RunConfig, evaluation: EvaluationManifest):
    made = run.made
    model = publish(config, made.train, evaluation, made.dataset, made.storage, report=ignore)
    card = (Path(made.storage.uri(folder(model.name, model.version))) / "README.md").read_text()
    page = render(run_of(run, config=config, evaluation=evaluation, model=model))
    group, part = evaluation.tasks["night_sums"].metrics[0], evaluation.tasks["sums"].metrics[0]
    assert f"| night_sums | 3.0 | {SHOTS} | 15 | acc | {group.value:.4f} ± {group.stderr:.4f} |" in card
    assert "| sums |" not in card  # counted in its group
    assert f"<td>{SHOTS}</td><td>15</td><td>acc</td><td>{group.value:.4f} ± {group.stderr:.4f}</td>" in page
    assert (
        f"<td class=left>night_sums</td><td>2.0</td><td>{SHOTS}</td><td>9</td><td>acc</td><td>{part.value:.4f} ± "
        in page
    )
    assert evaluation.harness in card
    assert evaluation.harness in page
    assert "task_folder" not in str(model.config)  # a place on this machine
    assert model.version != run.manifest.version


def test_without_tasks_every_digest_is_what_it_was_before_there_were_any(run: PublishedRun, config: RunConfig):
    made, result = run.made, run.evaluation
    expected = {
        "format": 1,
        "checkpoint": made.checkpoint.digest,
        "dataset": made.dataset.digest,
        "model": made.config.model.model_dump(mode="json"),
        "sequence_length": SEQUENCE,
        "max_tokens_per_source": made.config.evaluation.max_tokens_per_source,
    }
    assert identity(made.config, made.dataset, made.checkpoint) == digest_of(expected)
    assert result.digest == digest_of(result.model_dump(mode="json", exclude={"harness", "tasks"}))
    names = {"sequence_length", "max_tokens_per_source", "checkpoint"}
    assert published_config(made.config)["evaluation"].keys() == names
    assert published_config(config)["evaluation"].keys() == names | {"tasks", "few_shot", "task_limit"}


def test_the_identity_follows_the_tasks_and_their_files(
    run: PublishedRun, config: RunConfig, tmp_path: Path, s3_root: Any
):
    made = run.made

    def of(**settings: object) -> str:
        return identity(with_tasks(made.config, **settings), made.dataset, made.checkpoint)

    own = write_tasks(tmp_path / "own", Path("/nowhere"))
    found = {of(), of(task_folder=str(own)), of(few_shot=None), of(task_limit=3), of(tasks=("sums",))}
    assert len(found) == 5
    before = of(task_folder=str(own))
    (own / "__pycache__").mkdir()
    (own / "__pycache__" / "functions.pyc").write_bytes(b"1")
    assert of(task_folder=str(own)) == before
    bucket = Storage(s3_root)
    for path in own.rglob("*.*"):
        if path.is_file() and path.suffix != ".pyc":
            bucket.write(f"t/{path.relative_to(own)}", path.read_bytes())
    there = with_tasks(made.config, task_folder=bucket.uri("t"))
    there = there.model_copy(update={"storage": s3_root})
    assert identity(there, made.dataset, made.checkpoint) == before
    with (own / "data" / "sums.jsonl").open("a") as file:
        file.write("\n")
    assert of(task_folder=str(own)) != before


def test_tasks_from_s3(config: RunConfig, tmp_path: Path, s3_root: Any):
    bucket = Storage(s3_root)
    own = write_tasks(tmp_path / "own", tmp_path / "cache")
    for path in own.rglob("*.*"):
        if path.is_file():
            bucket.write(f"t/{path.relative_to(own)}", path.read_bytes())
    there = with_tasks(config, task_folder=bucket.uri("t")).model_copy(update={"storage": s3_root})
    with loaded(there) as (_, tasks):
        assert [getattr(task, "task_name", None) or task.name for task in tasks] == list(TASKS)
        assert len(tasks[1].test_docs()) == 5
        assert tasks[1].get_config("generation_kwargs")["max_gen_toks"] == NEW_TOKENS


def test_without_tasks_nothing_of_lm_eval_is_imported(run: PublishedRun, monkeypatch: pytest.MonkeyPatch):
    for name in ("lm_eval", "datasets", "pipeline.evaluation.harness"):
        monkeypatch.setitem(sys.modules, name, None)  # an import would fail
    made = run.made
    config = made.config.model_copy(update={"run_id": "without"})
    assert evaluate(config, made.dataset, made.checkpoint, made.storage, report=ignore).tasks == {}
    with pytest.raises(ImportError):
        evaluate(with_tasks(config), made.dataset, made.checkpoint, made.storage, report=ignore)
