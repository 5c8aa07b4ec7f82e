"""Revisions: every evaluated checkpoint as a version of its own, and what still has to be pushed, by the records."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.config.schema import CheckpointConfig, HubConfig, RunConfig
from pipeline.evaluation.heldout import evaluate
from pipeline.manifest import CheckpointManifest, ModelManifest
from pipeline.publishing import hub, registry, targets
from pipeline.publishing.export import publish
from pipeline.training.checkpoint import Checkpointer
from pipeline.training.commits import RunFacts
from tests.evaluation.make import MadeRun, make_run, run_config


@dataclass(frozen=True)
class Two:
    made: MadeRun
    earlier: CheckpointManifest
    later: ModelManifest

    def config(self, **publishing: object) -> RunConfig:
        section = self.made.config.publishing.model_copy(update=publishing)
        return self.made.config.model_copy(update={"publishing": section})


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    """A run with evaluated checkpoints of steps 20 and 50, of which the later one is published."""
    import torch

    made = make_run(run_config(str(tmp_path_factory.mktemp("revisions"))))
    facts = RunFacts(made.config.run_id, {"model": "made"}, made.dataset.digest, "0" * 64)
    saver = Checkpointer(made.storage, CheckpointConfig(async_save=False, keep=9), facts, torch.device("cpu"))
    saver.save(dict(made.model.state_dict()), step=20, next_sequence=80, tokens_seen=5000, loss=5.8)
    earlier = saver.settle()
    saver.close()
    assert earlier is not None
    found = {}
    for checkpoint in (earlier, made.checkpoint):
        found[checkpoint.step] = evaluate(made.config, made.dataset, checkpoint, made.storage, report=lambda _: None)
    later = publish(made.config, made.train, found[50], made.dataset, made.storage, report=lambda _: None)
    return Two(made, earlier, later)


def test_every_evaluated_checkpoint_becomes_a_version(two: Two):
    made, config = two.made, two.config(revisions=True)
    assert targets.missing(two.config(), made.dataset, made.checkpoint, two.later, made.storage) == ""
    assert targets.missing(config, made.dataset, made.checkpoint, two.later, made.storage) == "step 20"
    ((checkpoint, evaluation),) = targets.others(config, made.dataset, made.checkpoint, made.storage)
    assert checkpoint == two.earlier
    quiet = two.config(revisions=True, promote=False)
    model = publish(
        quiet, made.train, evaluation, made.dataset, made.storage, checkpoint=checkpoint, report=lambda _: None
    )
    assert targets.missing(config, made.dataset, made.checkpoint, two.later, made.storage) == ""
    assert hub.revision_of(model) == "step-00000020"
    folder = Path(made.storage.uri(registry.folder(model.name, model.version)))
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [5, 10, 15, 20]  # its part of the log
    later = Path(made.storage.uri(registry.folder(two.later.name, two.later.version)))
    assert len((later / "training_log.jsonl").read_text().splitlines()) == 10
    assert registry.latest(made.storage, "tiny").version == two.later.version  # promotion is the chosen one's
    assert f"{evaluation.overall.loss:.3f}" in (folder / "README.md").read_text()


def test_what_has_to_be_pushed_is_told_by_the_records(two: Two):
    made, config = two.made, two.config(hub=HubConfig(repo="people/tiny"))
    assert list(targets.unpushed(two.config(), two.later, made.storage)) == []
    assert list(targets.unpushed(config, two.later, made.storage)) == ["step-00000050", "main"]
    for revision, digest in (("step-00000050", two.later.digest), ("main", "0" * 64)):
        pushed = hub.Pushed(
            repo="people/tiny", revision=revision, version=two.later.version, manifest_digest=digest, commit="c"
        )
        made.storage.write(hub.record_path("people/tiny", revision), pushed.to_json())
    assert list(targets.unpushed(config, two.later, made.storage)) == ["main"]  # another version was there
    missing = targets.missing(config, made.dataset, made.checkpoint, two.later, made.storage)
    assert missing == "revision main of people/tiny"
    other = two.later.model_copy(update={"version": "step-00000060-x"})
    registry.promote(made.storage, other.model_copy(update={"step": 60}))
    assert list(targets.unpushed(config, two.later, made.storage)) == []  # main is the newer one's business


def test_provenance_is_a_statement_about_every_file(two: Two):
    folder = Path(two.made.storage.uri(registry.folder(two.later.name, two.later.version)))
    found = json.loads((folder / "provenance.json").read_text())
    assert found["_type"] == "https://in-toto.io/Statement/v1"
    assert found["predicateType"] == "https://slsa.dev/provenance/v1"
    import hashlib

    there = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    del there["provenance.json"]
    assert {subject["name"]: subject["digest"]["sha256"] for subject in found["subject"]} == there
    materials = {each["name"]: each for each in found["predicate"]["buildDefinition"]["resolvedDependencies"]}
    assert materials["dataset"]["digest"]["sha256"] == two.made.dataset.digest
    assert materials["checkpoint"]["uri"] == "storage:runs/made/train/step-00000050"
    assert str(two.made.storage.root) not in json.dumps(found)


def test_provenance_that_is_missing_is_made_by_the_next_publisher(two: Two):
    made = two.made
    path = f"{registry.folder(two.later.name, two.later.version)}/provenance.json"
    before = made.storage.read(path)
    made.storage.delete(path)
    evaluation = evaluate(made.config, made.dataset, made.checkpoint, made.storage, report=lambda _: None)
    publish(made.config, made.train, evaluation, made.dataset, made.storage, report=lambda _: None)
    assert made.storage.read(path) == before
