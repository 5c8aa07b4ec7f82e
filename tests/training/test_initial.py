"""Which weights a run starts from: asked once, pinned by digest, refused before anything expensive."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.load import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.manifest import ModelManifest
from pipeline.publishing import registry
from pipeline.storage import Storage
from pipeline.training.identity import identity_of
from pipeline.training.initial import answer_path, check, pin, pinned, split
from tests.training.make import Watched, tiny

TOKENIZER = "a" * 64


def asking(root: Path, question: str = "promoted", **overrides: object) -> tuple[RunConfig, Storage]:
    config = tiny(str(root), training__initial_weights=question, publishing={"name": "m"}, **overrides)
    return config, Storage(config.storage)


def promote(config: RunConfig, storage: Storage, version: str, **model: object) -> ModelManifest:
    """A published version, as far as its manifest tells; `model`: settings of its network that differ."""
    facts = dict.fromkeys(("checkpoint_digest", "evaluation_digest", "dataset_digest"), "0" * 64)
    values = {
        "name": "m", "version": version, "files": (), **facts, "tokenizer_sha256": TOKENIZER, "run_identity": version,
        "config": {"model": config.model.model_dump(mode="json") | model}, "git_commit": "c", "step": 1, "loss": 1.0, "bits_per_byte": 1.0,
    }  # fmt: skip
    manifest = ModelManifest.model_validate(values)
    registry.commit(storage, manifest)
    registry.promote(storage, manifest)
    return manifest


def test_the_answer_is_given_once_and_holds(tmp_path: Path) -> None:
    config, storage = asking(tmp_path)
    first = promote(config, storage, "v1")
    assert pinned(config, storage) == config  # looking answers nothing
    assert not storage.exists(answer_path("tiny"))
    answered = pin(config, storage)
    assert answered.training.initial_weights == f"models/m/v1@sha256:{first.digest}"

    promote(config, storage, "v2")
    assert pin(config, storage) == pinned(config, storage) == answered
    other = config.model_copy(update={"run_id": "other"})
    assert split(str(pin(other, storage).training.initial_weights))[0] == "models/m/v2"
    identity = identity_of(answered, "0" * 64, {})
    assert identity["training.initial_weights"] == f"models/m/v1@sha256:{first.digest}"


def test_nothing_is_promoted_yet(tmp_path: Path) -> None:
    config, storage = asking(tmp_path)
    with pytest.raises(ConfigError, match=r"nothing is at .*/models/m/latest.json; .*promoted-or-fresh"):
        pin(config, storage)
    assert not storage.exists(answer_path("tiny"))

    config, storage = asking(tmp_path, "promoted-or-fresh")
    fresh = pin(config, storage)
    assert fresh.training.initial_weights is None
    promote(config, storage, "v1")  # the run has begun without it, and stays so
    assert pin(config, storage) == fresh


def test_another_driver_was_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, storage = asking(tmp_path)
    first = promote(config, storage, "v1")
    create = Storage.create

    def slower(self: Storage, path: str, data: bytes) -> bool:
        monkeypatch.undo()
        promote(config, storage, "v2")
        assert split(str(pin(config, Storage(config.storage)).training.initial_weights))[0] == "models/m/v2"
        return create(self, path, data)

    monkeypatch.setattr(Storage, "create", slower)
    assert pin(config, storage).training.initial_weights != f"models/m/v1@sha256:{first.digest}"
    assert pin(config, storage) == pinned(config, storage)


def test_another_network_or_tokenizer_is_refused(tmp_path: Path) -> None:
    config, storage = asking(tmp_path)
    promote(config, storage, "v1", n_routed_experts=8, max_position_embeddings=4096)
    with pytest.raises(ConfigError, match=r"does not fit this run: model.n_routed_experts is 4 here and 8 there$"):
        pin(config, storage)
    assert not storage.exists(answer_path("tiny"))  # a refusal is no answer

    promote(config, storage, "v2")
    answered = pin(config, storage)
    check(answered, storage, TOKENIZER)
    with pytest.raises(
        ConfigError, match=rf"the model knows {TOKENIZER[:16]}.*; set tokenizer.path to .*/models/m/v2$"
    ):
        check(answered, storage, "b" * 64)


def test_a_model_that_is_not_what_it_was(tmp_path: Path) -> None:
    config, storage = asking(tmp_path)
    manifest = promote(config, storage, "v1")
    answered = pin(config, storage)
    storage.write("models/m/v1/manifest.json", manifest.model_copy(update={"loss": 2.0}).to_json())
    with pytest.raises(ConfigError, match=rf"has digest \w+, but {manifest.digest} was asked for"):
        Watched().train(answered)
    storage.delete("models/m/v1")
    with pytest.raises(ConfigError, match=r"models/m/v1 has no manifest.json"):
        Watched().train(answered)


def test_training_wants_an_answer(tmp_path: Path) -> None:
    config, _ = asking(tmp_path)
    with pytest.raises(ValueError, match=r"initial_weights promoted: ask initial.pin\(\)"):
        Watched().train(config)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("models/m/v1", ("models/m/v1", None)),
        ("s3://b/m@sha256:" + "1f" * 32, ("s3://b/m", "1f" * 32)),
        ("odd@sha256:12", ("odd@sha256:12", None)),
    ],
)
def test_split(weights: str, expected: tuple[str, str | None]) -> None:
    assert split(weights) == expected
