"""The gate between evaluation and publishing."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from botocore.exceptions import EndpointConnectionError

from jobs.gate import main
from pipeline.config.schema import StorageConfig
from pipeline.manifest import EvaluationManifest, SourceScore
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
