"""Tasks of lm-eval that cannot be scored are refused in one line, before anything starts."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
import yaml
from lm_eval.tasks import TaskManager

from jobs import pipeline, stages, status
from jobs.cli import parser
from jobs.drivers.options import add_options
from jobs.stage import main as stage_main
from jobs.stages.records import Records
from jobs.views.summary import LONGEST_NAME, longer, task_lines
from pipeline.config.load import load_config
from pipeline.evaluation.paper import FIGURES
from pipeline.manifest import EvaluationManifest, SourceScore, TaskMetric, TaskScore
from tests.evaluation.make_tasks import write_tasks
from tests.jobs.conftest import LOOKING, TEXT, override

GENERATION = {"output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "x", "test_split": "test"}


pytestmark = pytest.mark.usefixtures("no_ray")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "own", tmp_path / "cache")


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *overrides: str) -> str:
    """What `jobs.pipeline` says instead of starting."""
    (tmp_path / "texts").mkdir(exist_ok=True)
    (tmp_path / "texts" / "a.txt").write_text(TEXT)
    root = tmp_path / "root"
    capsys.readouterr()
    assert (
        pipeline.main(
            ["--config", "debug", f"storage.root={root}", override(tmp_path / "texts"), "data.packing=pad", *overrides]
        )
        == 2
    )
    shown = capsys.readouterr()
    assert shown.out in ("", LOOKING)
    assert not root.exists() or list(root.iterdir()) == []
    told = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    return told[0]


def write_task(own: Path, name: str, **settings: object) -> None:
    data = {"data_files": {"test": "data/code.jsonl"}, "cache_dir": str(own.parent / "cache")}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": data, **GENERATION, **settings}
    (own / f"{name}.yaml").write_text(yaml.safe_dump(task))


def test_without_the_package(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )
    assert refused(capsys, tmp_path, "evaluation.tasks=[hellaswag]") == (
        "error: evaluation.tasks ['hellaswag']: the package lm-eval is not installed; "
        "pip install -c constraints.txt lm-eval, or leave evaluation.tasks empty"
    )


def test_an_unknown_task(capsys: pytest.CaptureFixture[str], tmp_path: Path, own: Path) -> None:
    told = refused(capsys, tmp_path, "evaluation.tasks=[sums, hellaswagg]", f"evaluation.task_folder={own}")
    assert told.startswith(
        "error: evaluation.tasks: lm-eval knows no task, group or tag 'hellaswagg'; did you mean hellaswag"
    )
    assert told.endswith("evaluation.task_folder has continue_code, more_sums, night_sums, prose, sums")


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("nowhere", "there is nothing in {root}/nowhere; name a folder or s3:// prefix with tasks in YAML"),
        ("own/data", "no YAML file in {root}/own/data is a task or group of lm-eval; each needs `task: <name>`"),
    ],
)
def test_a_folder_without_tasks(
    folder: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, own: Path
) -> None:
    told = refused(capsys, tmp_path, "evaluation.tasks=[sums]", f"evaluation.task_folder={tmp_path / folder}")
    assert told.startswith(f"error: evaluation.task_folder: {message.format(root=tmp_path)}")


def test_data_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path, own: Path) -> None:
    (own / "data" / "more.jsonl").unlink()
    told = refused(capsys, tmp_path, "evaluation.tasks=[prose, night_sums]", f"evaluation.task_folder={own}")
    assert told.startswith("error: evaluation.tasks: night_sums cannot be loaded (FileNotFoundError: ")
    assert "more.jsonl" in told
    assert told.endswith(
        "into evaluation.task_folder, or load it once where the Hugging Face Hub is reachable (HF_HUB_OFFLINE, HF_HOME)"
    )


def test_data_of_the_hub_without_network(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    write_task(own, "far", dataset_path="nobody/nothing", dataset_kwargs={})
    told = refused(capsys, tmp_path, "evaluation.tasks=[far]", f"evaluation.task_folder={own}")
    assert told.startswith(
        "error: evaluation.tasks: far cannot be loaded (ConnectionError: Couldn't reach 'nobody/nothing' on the Hub"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"generation_kwargs": {"do_sample": True, "temperature": 0.7}},
            "odd draws its answers (do_sample, temperature)",
        ),
        (
            {},
            "odd generates up to 256 tokens, which leaves no room for a prompt in 128; raise evaluation.sequence_length",
        ),
        ({"unsafe_code": True}, "odd runs code that the model wrote"),
    ],
)
def test_what_a_base_model_is_not_asked(
    settings: dict, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, own: Path
) -> None:
    write_task(own, "odd", **settings)
    chosen = ["evaluation.tasks=[odd]", f"evaluation.task_folder={own}", "evaluation.sequence_length=128"]
    assert refused(capsys, tmp_path, *chosen).startswith(f"error: evaluation.tasks: {message}")


def test_a_task_twice(capsys: pytest.CaptureFixture[str], tmp_path: Path, own: Path) -> None:
    assert (
        refused(capsys, tmp_path, "evaluation.tasks=[sums, sums]")
        == "error: evaluation.tasks: tasks: 'sums' is named twice"
    )
    told = refused(capsys, tmp_path, "evaluation.tasks=[sums, night_sums]", f"evaluation.task_folder={own}")
    assert "Duplicate task 'sums': found in both" in told


def scores() -> EvaluationManifest:
    overall = SourceScore(documents=1, tokens=2, text_bytes=3, loss=4.4204, bits_per_byte=1.7718)
    acc, match = (
        TaskMetric(name=name, filter=cut, value=value, stderr=stderr, higher_is_better=True)
        for name, cut, value, stderr in (("acc", "none", 0.25, 0.0125), ("exact_match", "strict-match", 0.5, None))
    )
    part = TaskScore(version="1.0", few_shot=0, documents=1000, group=None, metrics=(acc,))
    return EvaluationManifest(
        identity="", checkpoint_digest="", dataset_digest="", step=1, sequence_length=8, overall=overall, sources={},
        unigram_entropy=0.0, baselines={}, source_baselines={}, harness="lm-eval",
        tasks={
            "all": part.model_copy(update={"few_shot": None, "metrics": (acc, match)}),
            "part": part.model_copy(update={"group": "all"}),
            "alone": part,
        },
    )  # fmt: skip


LINES = [
    "tasks  all                  acc 0.2500 ± 0.0125  (1,000 documents, version 1.0)",
    "       all                  exact_match (strict-match) 0.5000  (1,000 documents, version 1.0)",
    "       alone                acc 0.2500 ± 0.0125  (1,000 documents, 0-shot, version 1.0)",
]


@pytest.mark.parametrize("backend", [[], ["--backend", "kuberay"]])
def test_the_next_command_is_this_one_with_more_tokens(backend: list[str]) -> None:
    """In the same storage, with the same settings, and a name that is not taken, however often it is followed."""
    made = parser("pipeline", "")
    add_options(made)
    name = "a-name-of-as-many-letters-as-it-may-have"
    assert len(name) == LONGEST_NAME
    typed = [
        "--config",
        "debug",
        *backend,
        "storage.root=/data/my store",
        f"run_id={name}",
        "optimizer.weight_decay=0.3",
    ]
    seen = set()
    for doublings in (0, 1, 2):
        given = made.parse_args(typed)
        config = load_config(given.config, given.overrides)
        assert config.schedule.total_tokens == load_config("debug").schedule.total_tokens * 2**doublings
        assert (config.storage.root, config.optimizer.weight_decay) == ("/data/my store", 0.3)
        assert given.backend == (backend or ["", "ray"])[1]
        seen.add(config.run_id)
        program, command, *typed = shlex.split(longer(config, given))
        assert (program, command) == ("moonlight", "run")
    assert len(seen) == 3


def test_lines_of_the_summary() -> None:
    assert task_lines(scores(), "tasks  ") == LINES
    assert task_lines(scores().model_copy(update={"tasks": {}}), "tasks  ") == []


def test_status_shows_them(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "find", lambda *_, **__: Records({"evaluate": scores()}))
    monkeypatch.setattr("jobs.views.status.require_run", lambda *_: None)
    assert status.main(["--config", "debug", f"storage.root={tmp_path}"]) == 0
    shown = capsys.readouterr().out.splitlines()[5:]
    assert shown[0] == "  held out  loss 4.420 nats per token, 1.772 bits per byte"
    assert shown[1:] == ["  tasks     " + LINES[0][7:], *("            " + line[7:] for line in LINES[1:])]


def test_the_stage_alone_asks_before_it_joins_a_cluster(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own / "data" / "sums.jsonl").unlink()
    monkeypatch.setattr(stages, "find", lambda *_, **__: Records())
    monkeypatch.setattr(stages, "require_inputs", lambda *_: None)
    chosen = ["evaluation.tasks=[sums]", f"evaluation.task_folder={own}"]
    assert stage_main("evaluate", ["--config", "debug", f"storage.root={tmp_path / 'root'}", *chosen]) == 2
    assert "evaluate: evaluation.tasks: sums cannot be loaded (FileNotFoundError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("{task: sumz, metric: acc, at_least: 0.5}", "publishing.gates[0].task: nobody computes 'sumz'; evaluation.tasks are sums: add it there"),
        ("{task: sums, metric: f1, at_least: 0.5}", "publishing.gates[0].metric: sums has no metric 'f1'; it has "),
    ],
)  # fmt: skip
def test_a_gate_on_what_nobody_computes(
    gate: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, own: Path
) -> None:
    chosen = ["evaluation.tasks=[sums]", f"evaluation.task_folder={own}", f"publishing.gates=[{gate}]"]
    assert refused(capsys, tmp_path, *chosen).startswith(f"error: {message}")


def test_a_gate_on_a_task_without_tasks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    told = refused(capsys, tmp_path, "publishing.gates=[{task: mmlu, metric: acc, at_least: 0.5}]")
    assert "publishing.gates[0].task mmlu: evaluation.tasks is empty, so nobody computes it; add it there" in told


def test_a_gate_on_a_source_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    told = refused(capsys, tmp_path, "publishing.gates=[{source: mars, at_most: 3.0}]")
    assert "publishing.gates[0].source: no source of the corpus is named 'mars'" in told


def test_the_papers_tasks_with_its_numbers_of_examples() -> None:
    evaluation = load_config("debug", ["evaluation.task_preset=moonlight"]).evaluation
    assert evaluation.few_shot == dict(zip(evaluation.tasks, [5, 5, 3, 5, 4, 4, 5, 5]))
    known = TaskManager().task_index
    assert set(evaluation.tasks) <= known.keys()
    assert set(FIGURES) == set(evaluation.tasks) - {"minerva_math"}
    assert {name: figure.few_shot for name, figure in FIGURES.items()}.items() <= evaluation.few_shot.items()
    chosen = load_config("debug", ["evaluation.task_preset=moonlight", "evaluation.tasks=[mmlu]"]).evaluation
    assert (chosen.tasks, chosen.few_shot) == (("mmlu",), None)
