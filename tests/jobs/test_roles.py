"""Each stage's program gets by with what its role may reach (infra/modules/plan/storage.tf): an S3 server that answers 403 to the rest."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from data_prep.identity import identity, list_corpus
from jobs import stages
from jobs.stages import find, run
from jobs.stages.records import Records
from pipeline.config.schema import RunConfig, StorageConfig, TokenizerConfig
from pipeline.evaluation.heldout import evaluate
from pipeline.file_index import dataset_path
from pipeline.publishing import registry
from pipeline.publishing.export import publish
from pipeline.storage import Storage, filesystem
from pipeline.training.commits import train_folder
from pipeline.training.identity import run_identity
from tests.data_prep.faulty_s3 import FaultyS3
from tests.evaluation.make import TEXTS, make_run, run_config
from tests.infra.test_terraform import needs_terraform, plan

pytestmark = needs_terraform
BUCKET = "moonlight"  # of the plan for prod, as is the prefix


def role(stage: str) -> Callable[[str, str], str]:
    """What S3 answers to a request under the stage's policy."""
    policy: dict[str, dict[str, Any]] = {
        each["Sid"]: each for each in json.loads(plan("prod")["policies"][stage])["Statement"]
    }

    def answer(method: str, path: str) -> str:
        parts = urlsplit(path)
        key = unquote(parts.path).lstrip("/").partition("/")[2]
        if key:
            allowed = policy["Read" if method in ("GET", "HEAD") else "Write"]["Resource"]
            asked = f"arn:aws:s3:::{BUCKET}/{key}"
        elif method == "POST":
            return "served"  # several deletions: of what, the body says
        else:
            allowed = policy["List"]["Condition"]["StringLikeIfExists"]["s3:prefix"]
            asked = parse_qs(parts.query, keep_blank_values=True).get("prefix", [allowed[0]])[0]
        return "served" if any(fnmatch.fnmatchcase(asked, pattern) for pattern in allowed) else "403"

    return answer


@pytest.fixture
def proxy(s3_server: str) -> Iterator[FaultyS3]:
    server = filesystem("s3://", StorageConfig(root="s3://any", endpoint_url=s3_server))
    server.mkdir(BUCKET)
    with FaultyS3(s3_server, error_rate=0, drop_rate=0) as proxy:
        proxy.rule = lambda method, path: "served"
        yield proxy
    server.rm(BUCKET, recursive=True)


@pytest.fixture
def published(proxy: FaultyS3) -> RunConfig:
    """A run whose stages are all done."""
    plain = run_config(f"s3://{BUCKET}/production")
    where = plain.storage.model_copy(update={"endpoint_url": proxy.url})
    sources = []
    for source in plain.corpus.sources:
        path = f"s3://{BUCKET}/corpus/{source.name}"
        for number, text in enumerate(TEXTS[source.name]):
            filesystem(path, where).pipe_file(f"{path}/{number}.txt", text.encode())
        sources.append(source.model_copy(update={"path": path, "max_epochs": 1e6}))
    corpus = plain.corpus.model_copy(update={"sources": tuple(sources)})
    data = plain.data.model_copy(update={"lanes": 2, "mixture_block": 8, "rows_per_group": 1})
    config = plain.model_copy(update={"storage": where, "corpus": corpus, "data": data})
    made = make_run(config)
    dataset = made.dataset.model_copy(update={"identity": identity(config, list_corpus(config))})
    train = made.train.model_copy(update={"identity": run_identity(config, dataset)})
    made.storage.create(dataset_path(dataset.identity), dataset.to_json())
    made.storage.write(f"{train_folder(config.run_id)}/manifest.json", train.to_json())
    evaluation = evaluate(config, dataset, made.checkpoint, made.storage, report=lambda _: None)
    publish(config, train, evaluation, dataset, made.storage, report=lambda _: None)
    return config


def test_a_stage_that_is_asked_again_and_prepare_of_a_run_that_starts_from_a_model(
    proxy: FaultyS3, published: RunConfig
) -> None:
    """A head that came back is asked for a stage that is done, when later ones may be, too."""
    storage = Storage(published.storage)
    model = find(published, storage).model
    assert model is not None
    weights = f"{registry.folder(model.name, model.version)}@sha256:{model.digest}"
    training = published.training.model_copy(update={"initial_weights": weights})
    again = published.model_copy(update={"run_id": "again", "training": training})
    with_its = TokenizerConfig(path=storage.uri(registry.folder(model.name, model.version)))
    for stage in stages.names():
        proxy.rule = role(stage)
        run(stage, published, storage)
        if stage != "publish":
            with pytest.raises(PermissionError):
                storage.write(f"models/{model.name}/latest.json", b"{}")
        if stage == "prepare":  # before anything is done, and as the message of another tokenizer advises
            stages.check([stage], again.model_copy(update={"tokenizer": with_its}), storage, Records())
        if stage == "train":
            stages.check([stage], again, storage, find(again, storage, stage, until=stage))
