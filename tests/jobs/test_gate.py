"""The gate between evaluation and publishing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from botocore.exceptions import EndpointConnectionError

from jobs.gate import main
from jobs.stages.publish import gate
from pipeline.config.load import load_config
from pipeline.config.schema import StorageConfig
from pipeline.manifest import CheckpointManifest, EvaluationManifest, SourceScore, TrainManifest
from pipeline.publishing.gate import not_a_score
from pipeline.storage import open_storage
from pipeline.workflow.rayjobs import Outcome


def train(root: Path, *, steps: int = 10) -> None:
    """The run is complete, with a checkpoint a step."""
    storage = open_storage(StorageConfig(root=str(root)))
    for step in range(1, steps + 1):
        manifest = checkpoint(step)
        storage.write(f"runs/debug/train/step-{step:08d}/manifest.json", manifest.to_json())
    whole = TrainManifest(identity="i", checkpoint=manifest, steps=steps, metrics=(), skipped_steps=0)
    storage.write("runs/debug/train/manifest.json", whole.to_json())


def checkpoint(step: int) -> CheckpointManifest:
    return CheckpointManifest(
        run_id="debug", run_identity="r", step=step, next_sequence=step, tokens_seen=step, dataset_digest="d",
        order_digest="o", content_sha256=f"{step}", files=(), loss=1.0, world_size=1,
    )  # fmt: skip


def evaluate(root: Path, step: int, loss: float, of: str | None = None) -> None:
    score = SourceScore(documents=1, tokens=100, text_bytes=300, loss=loss, bits_per_byte=loss / 2)
    record = EvaluationManifest(
        identity="i",
        checkpoint_digest=of or checkpoint(step).digest,
        dataset_digest="d",
        step=step,
        sequence_length=8,
        overall=score,
        sources={"a": score},
        unigram_entropy=7.0,
        baselines={},
        source_baselines={},
    )
    open_storage(StorageConfig(root=str(root))).write(f"runs/debug/evaluate/step-{step:08d}.json", record.to_json())


def ask(root: Path, *settings: str) -> tuple[str, str]:
    config = load_config("debug", [f"storage.root={root}", *settings])
    return gate(config, open_storage(config.storage))[:2]


@pytest.mark.parametrize(
    ("losses", "settings", "expected"),
    [
        ({}, [], "closed"),
        ({10: 3.0}, [], "open"),
        ({10: 3.0}, ["publishing.max_loss=2.9"], "closed"),
        ({10: 3.0}, ["publishing.max_loss=3.0"], "open"),
        ({9: 3.0, 10: 2.0}, ["publishing.max_loss=2.5"], "open"),
        ({9: 2.0, 10: 3.0}, ["publishing.max_loss=2.5"], "closed"),
        ({9: 2.0}, [], "closed"),  # another checkpoint's
        ({9: 2.0, 10: 3.0}, ["publishing.max_loss=2.5", "evaluation.checkpoint=9"], "open"),
        ({9: 3.0, 10: 2.0}, ["publishing.max_loss=2.5", "evaluation.checkpoint=9"], "closed"),
    ],
)
def test_the_evaluation_of_the_checkpoint_that_is_meant_decides(
    tmp_path: Path, losses: dict[int, float], settings: list[str], expected: str
) -> None:
    train(tmp_path)
    for step, loss in losses.items():
        evaluate(tmp_path, step, loss)
    assert ask(tmp_path, *settings)[0] == expected


def test_it_stays_closed_without_the_checkpoint_or_with_the_score_of_another(tmp_path: Path) -> None:
    evaluate(tmp_path, 10, 2.0)
    assert ask(tmp_path) == ("closed", "run debug has not been trained to its end, or not been averaged")
    train(tmp_path)
    evaluate(tmp_path, 10, 2.0, of="an earlier run's")
    assert ask(tmp_path)[0] == "closed"
    assert "scored another checkpoint of step 10" in ask(tmp_path)[1]


def test_the_answer_lies_in_files(tmp_path: Path) -> None:
    train(tmp_path / "root")
    evaluate(tmp_path / "root", 10, 3.0)
    assert main(["--config", "debug", "--output", str(tmp_path), f"storage.root={tmp_path / 'root'}"]) == 0
    assert (tmp_path / "gate").read_text() == "open"
    assert (tmp_path / "reason").read_text()


@pytest.mark.parametrize(
    ("loss", "tokens", "bits"),
    [("NaN", 100, 2.0), ("Infinity", 100, 2.0), (2.0, 0, 1.0), (2.0, 100, "NaN"), ("-Infinity", 100, 1.0)],
)
@pytest.mark.parametrize("part", ["overall", "a"])
@pytest.mark.parametrize("limit", ["null", "9"])
def test_what_is_no_score_opens_nothing(
    tmp_path: Path, part: str, loss: float | str, tokens: int, bits: float | str, limit: str
) -> None:
    """Our own writer refuses to store such a record; another's may not."""
    train(tmp_path / "root", steps=9)
    evaluate(tmp_path / "root", 9, 3.0)
    (path,) = (tmp_path / "root").rglob("evaluate/step-*.json")
    record = json.loads(path.read_text())
    del record["record_sha256"]
    score = record["overall"] if part == "overall" else record["sources"]["a"]
    score.update(loss=float(loss), tokens=tokens, bits_per_byte=float(bits))
    path.write_text(json.dumps(record))
    overrides = [f"storage.root={tmp_path / 'root'}", f"publishing.max_loss={limit}"]
    assert main(["--config", "debug", "--output", str(tmp_path), *overrides]) == 0
    assert (tmp_path / "gate").read_text() == "closed"
    where = "the held-out loss is" if part == "overall" else "the held-out loss of source 'a' is"
    assert where in (tmp_path / "reason").read_text()
    evaluation = EvaluationManifest.model_validate_json(path.read_bytes())
    assert not_a_score(evaluation) is not None


def test_a_damaged_evaluation_opens_nothing(tmp_path: Path) -> None:
    train(tmp_path / "root", steps=9)
    evaluate(tmp_path / "root", 9, 3.0)
    (path,) = (tmp_path / "root").rglob("evaluate/step-*.json")
    path.write_text(path.read_text().replace("3.0", "2.0"))
    assert main(["--config", "debug", "--output", str(tmp_path), f"storage.root={tmp_path / 'root'}"]) == 0
    assert (tmp_path / "gate").read_text() == "closed"
    assert f"{path}: not a sound EvaluationManifest" in (tmp_path / "reason").read_text()


def test_storage_that_does_not_answer_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the workflow, whose step is tried again on this exit code."""

    def silence(config: object, storage: object) -> None:
        raise EndpointConnectionError(endpoint_url="http://127.0.0.1:9")  # after ten real attempts, which take minutes

    monkeypatch.setattr("jobs.stages.publish.gate", silence)
    assert main(["--config", "debug", "--output", str(tmp_path)]) == Outcome.INFRASTRUCTURE
    assert not (tmp_path / "gate").exists()
    templates = yaml.safe_load(Path("k8s/workflows/run.yaml").read_text())["spec"]["templates"]
    retry = next(template for template in templates if template["name"] == "gate")["retryStrategy"]
    assert str(int(Outcome.INFRASTRUCTURE)) in retry["expression"]


def test_a_wrong_configuration_is_exit_code_2(tmp_path: Path) -> None:
    assert main(["--config", "debug", "--output", str(tmp_path), "publishing.max_los=1"]) == 2
    assert not (tmp_path / "gate").exists()
