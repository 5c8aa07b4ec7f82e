"""The gate between evaluation and publishing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from botocore.exceptions import EndpointConnectionError

from jobs.gate import main
from pipeline.config.schema import StorageConfig
from pipeline.manifest import EvaluationManifest, SourceScore
from pipeline.publishing.gate import refusal
from pipeline.storage import open_storage
from pipeline.workflow.rayjobs import Outcome


def evaluate(root: Path, step: int, loss: float) -> None:
    score = SourceScore(documents=1, tokens=100, text_bytes=300, loss=loss, bits_per_byte=loss / 2)
    record = EvaluationManifest(
        identity="i",
        checkpoint_digest="c",
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


@pytest.mark.parametrize(
    ("losses", "limit", "expected"),
    [
        ([], "null", "closed"),
        ([3.0], "null", "open"),
        ([3.0], "2.9", "closed"),
        ([3.0], "3.0", "open"),
        ([3.0, 2.0], "2.5", "open"),
        ([2.0, 3.0], "2.5", "closed"),
    ],
)
def test_the_newest_evaluation_decides(tmp_path: Path, losses: list[float], limit: str, expected: str) -> None:
    for step, loss in enumerate(losses, start=9):
        evaluate(tmp_path / "root", step, loss)
    assert (
        main(
            [
                "--config",
                "debug",
                "--output",
                str(tmp_path),
                f"storage.root={tmp_path / 'root'}",
                f"publishing.max_loss={limit}",
            ]
        )
        == 0
    )
    assert (tmp_path / "gate").read_text() == expected
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
    evaluate(tmp_path / "root", 9, 3.0)
    (path,) = (tmp_path / "root").rglob("step-*.json")
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
    assert refusal(evaluation, None if limit == "null" else 9.0) is not None


def test_a_damaged_evaluation_opens_nothing(tmp_path: Path) -> None:
    evaluate(tmp_path / "root", 9, 3.0)
    (path,) = (tmp_path / "root").rglob("step-*.json")
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
