"""One made and published run, and a real S3 server, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer

from pipeline.config.schema import StorageConfig
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


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StorageConfig]:
    """The root of a bucket on a server of its own."""
    patch = pytest.MonkeyPatch()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "test")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="models")
    yield StorageConfig(root="s3://models/root", endpoint_url=endpoint, region="us-east-1")
    server.stop()
    patch.undo()
