"""Retraining, without Ray: the second run starts where the published model stands, and takes the corpus as it then is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from data_prep.prepare import prepare
from jobs import pipeline, stages
from jobs.cli import open_run
from jobs.stages.records import hold_dataset, open_dataset
from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig
from pipeline.evaluation.heldout import evaluate
from pipeline.manifest import ModelManifest
from pipeline.publishing import registry
from pipeline.publishing.export import publish
from pipeline.storage import Storage, open_storage
from pipeline.training import initial
from pipeline.training.batches import read_step
from pipeline.training.trainer import Run, train

STEPS, BATCH, LENGTH = 2, 4, 64
TOKENS = STEPS * BATCH * LENGTH
SMALL = [
    *(f"model.{name}={value}" for name, value in {
        "vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_lora_rank": 16,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "intermediate_size": 64,
        "moe_intermediate_size": 16, "n_routed_experts": 4,
    }.items()),
    f"training.sequence_length={LENGTH}",
    "training.log_every=1",
    f"training.micro_batch={BATCH}",
    f"schedule.total_tokens={TOKENS}",
    f"schedule.learning_rate=[{{until_tokens: {TOKENS}, shape: constant, start: 0.02, end: 0.02}}]",
    f"schedule.global_batch=[{{until_tokens: {TOKENS}, sequences: {BATCH}}}]",
    f"schedule.bias_rate=[{{until_tokens: {TOKENS}, rate: 0.0}}]",
    "parallelism={shard: 1, ep: 1}",
    "training.aux_loss_weight=0.0",
    "evaluation.max_tokens_per_source=500",
    "publishing.sample_prompts=[]",
    "publishing.beats_frequencies=false",  # after two steps
]  # fmt: skip


def arguments(root: Path, *more: str) -> list[str]:
    corpus = {"sources": [{"name": "text", "path": str(root / "corpus"), "max_epochs": 50}], "heldout_fraction": 0.2}
    return [
        *SMALL,
        f"storage.root={root / 'storage'}",
        'tokenizer={"vocab_size": 600, "training_bytes": 100000}',
        f"corpus={json.dumps(corpus)}",
        "data={sequence_length: 64, rows_per_group: 1, max_padding: 1.0, lanes: 4, mixture_block: 4}",
        *more,
    ]


def grow(root: Path, first: int, last: int) -> None:
    (root / "corpus").mkdir(exist_ok=True)
    for number in range(first, last):
        words = " ".join(f"{name}{number * 7 % 13}" for name in ("moon", "tide", "sand", "rope", "lamp") * 12)
        (root / "corpus" / f"{number}.txt").write_text(f"Page {number}. {words}\n")


def run(config: RunConfig, storage: Storage) -> tuple[list[float], ModelManifest]:
    """All four stages, in this process. Returns the losses of the steps and what was published."""
    losses: list[float] = []
    dataset = prepare(config, storage)
    hold_dataset(config, storage, dataset)
    stages.check(["train"], config, storage, stages.find(config, storage, "train"))
    trained = train(config, dataset, storage, report=lambda at: losses.append(at.loss))
    evaluation = evaluate(config, dataset, trained.checkpoint, storage, report=lambda _: None)
    return losses, publish(config, trained, evaluation, dataset, storage, report=lambda _: None)


def test_the_second_run_starts_where_the_published_model_stands(tmp_path: Path) -> None:
    grow(tmp_path, 0, 60)
    config, storage = open_run("debug", arguments(tmp_path, "run_id=monday", "publishing.name=m"))
    _, first = run(config, storage)

    grow(tmp_path, 60, 90)  # a week later
    again = arguments(
        tmp_path, "run_id=next-monday", "publishing.name=m", "seed=5", "training.initial_weights=promoted"
    )
    config, storage = open_run("debug", again)
    config = initial.pin(config, storage)
    losses, second = run(config, storage)

    begun = Run(config.model_copy(update={"run_id": "to-read-its-first-batch"}), dataset_of(config, storage), storage)
    micro = read_step(begun.loader, 0, BATCH, BATCH, False).micro_batches[0]
    begun.close()
    folder = storage.uri(registry.folder("m", first.version))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(micro.tokens_BS).logits
    theirs = F.cross_entropy(logits.flatten(0, 1), micro.labels_BS.flatten(), ignore_index=-100)
    assert losses[0] == pytest.approx(float(theirs), rel=1e-5)
    assert losses[0] < 6.3  # ln 600 = 6.40: it has learned something already
    # the new version tells where it came from, and that the corpus was another, with the same tokenizer
    assert second.config["training"]["initial_weights"] == f"models/m/{first.version}@sha256:{first.digest}"
    assert (second.dataset_digest != first.dataset_digest, second.tokenizer_sha256) == (True, first.tokenizer_sha256)
    latest = registry.latest(storage, "m")
    assert latest is not None
    assert (latest.version, latest.previous) == (second.version, (first.version,))

    # what is promoted now is another model, but the run stays what it was: everything is up to date
    config, storage = open_run("debug", again)
    assert stages.find(config, storage).model == second
    assert initial.pin(config, storage) == config


def dataset_of(config: RunConfig, storage: Storage):  # type: ignore[no-untyped-def]
    found = stages.find(config, storage, "train").dataset
    assert found is not None
    return found


def test_a_corpus_that_grows_while_the_run_waits_or_trains(tmp_path: Path) -> None:
    grow(tmp_path, 0, 60)
    config, storage = open_run("debug", arguments(tmp_path, "run_id=monday"))
    monday = prepare(config, storage)
    hold_dataset(config, storage, monday)
    assert stages.find(config, storage).dataset == monday

    grow(tmp_path, 60, 70)  # while it waits for GPUs
    assert stages.find(config, storage, "train").dataset == monday
    assert stages.finished("prepare", config, storage)
    assert stages.find(config, storage).dataset is None  # prepare would take the new files in: nothing has begun
    tuesday = prepare(config, storage)
    hold_dataset(config, storage, stages.find(config, storage).dataset)
    assert stages.find(config, storage, "train").dataset == tuesday != monday

    storage.write("runs/monday/train/step-00000001/anything", b"x")
    grow(tmp_path, 70, 80)  # while it trains
    for stage in ("prepare", "train", "evaluate", "publish"):
        assert stages.find(config, storage, stage).dataset == tuesday
    assert open_dataset(config, storage) == tuesday  # what jobs.verify and jobs.inspect look at
    (tmp_path / "corpus").rename(tmp_path / "archive")
    assert stages.find(config, storage).dataset == tuesday

    (tmp_path / "archive").rename(tmp_path / "corpus")
    other = config.model_copy(update={"corpus": config.corpus.model_copy(update={"heldout_fraction": 0.3})})
    assert stages.find(other, storage, "train").dataset is None  # other settings are another dataset
    assert stages.find(config.model_copy(update={"run_id": "wednesday"}), storage).dataset is None


REFUSED = {
    "another network": (["model.hidden_size=64"], "model.hidden_size is 64 here and 32 there"),
    "another tokenizer": (
        ['tokenizer={"vocab_size": 600, "training_bytes": 50000}'],
        "a new one would be trained, but the run starts from m step-00000002-",
    ),
    "nothing promoted": (["publishing.name=other"], "training.initial_weights promoted: nothing is at"),
}


@pytest.fixture(scope="module")
def promoted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("promoted")
    grow(root, 0, 60)
    run(*open_run("debug", arguments(root, "run_id=monday", "publishing.name=m")))
    return root


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_does_not_fit_is_refused_before_anything_starts(
    name: str, promoted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, message = REFUSED[name]
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was started"))
    given = [f"run_id={name.replace(' ', '-')}", "publishing.name=m", "training.initial_weights=promoted", *changes]
    given = arguments(promoted, *given)
    assert pipeline.main(["--config", "debug", *given]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert (shown.err.count("\n"), shown.out.count("\n")) == (1, 1)


def test_the_first_run_of_a_schedule_says_that_it_starts_afresh(
    promoted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.drivers.ray_jobs.run_on_ray", lambda *_: None)
    monkeypatch.setattr("jobs.drivers.pipeline.print_summary", lambda *_: None)
    for name, expected in (("new", "drawn weights: nothing was promoted"), ("m", "models/m/step-00000002-")):
        given = [f"run_id=first-{name}", f"publishing.name={name}", "training.initial_weights=promoted-or-fresh"]
        assert pipeline.main(["--config", "debug", *arguments(promoted, *given)]) == 0
        assert capsys.readouterr().out.splitlines()[1].startswith(f"first-{name} starts from {expected}")


def test_the_remedy_for_another_tokenizer_works(promoted: Path) -> None:
    """`tokenizer.path` may be the published folder itself."""
    storage = open_storage(load_config("debug", arguments(promoted)).storage)
    latest = registry.latest(storage, "m")
    assert latest is not None
    folder = storage.uri(registry.folder("m", latest.version))
    given = arguments(promoted, "run_id=fixed", "publishing.name=m", "training.initial_weights=promoted")
    config, storage = open_run("debug", [*given, f"tokenizer.path={folder}"])
    config = initial.pin(config, storage)
    dataset = prepare(config, storage)
    initial.check(config, storage, dataset.tokenizer.sha256)
