"""One made and published run for the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pipeline.evaluation.heldout import evaluate
from pipeline.manifest import EvaluationManifest, ModelManifest
from pipeline.publishing.export import publish
from pipeline.publishing.registry import folder
from tests.evaluation.make import MadeRun, make_run, run_config

PROMPTS = ["def area(", "The moon"]


@dataclass(frozen=True)
class PublishedRun:
    made: MadeRun
    evaluation: EvaluationManifest
    manifest: ModelManifest
    folder: Path

    def publish(self, **changes: object) -> ModelManifest:
        """Publish again, with other settings of the publishing section."""
        section = self.made.config.publishing.model_copy(update=changes)
        config = self.made.config.model_copy(update={"publishing": section})
        made = self.made
        return publish(config, made.train, self.evaluation, made.dataset, made.storage, report=lambda _: None)


def published(root: str) -> PublishedRun:
    made = make_run(run_config(root, sample_prompts=PROMPTS))
    evaluation = evaluate(made.config, made.dataset, made.checkpoint, made.storage, report=lambda _: None)
    manifest = publish(made.config, made.train, evaluation, made.dataset, made.storage, report=lambda _: None)
    return PublishedRun(made, evaluation, manifest, Path(made.storage.uri(folder(manifest.name, manifest.version))))


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> PublishedRun:
    torch.set_num_threads(1)
    return published(str(tmp_path_factory.mktemp("published")))
