"""The mean of checkpoints: bitwise what torch gives of the whole tensors in fp32, made tensor by tensor."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.stages.train import chosen_checkpoint
from pipeline.config.load import ConfigError
from pipeline.evaluation.weights import load_model, read_tensors
from pipeline.manifest import CheckpointManifest
from pipeline.model.moonlight import Moonlight
from pipeline.storage import Storage
from pipeline.training import average
from pipeline.training.average import make_average
from pipeline.training.commits import committed_steps, read_average, read_manifest, step_folder, train_folder
from pipeline.training.retention import averaged_steps, named_steps
from tests.training.make import Watched, tiny


def trained(root: Any, **settings: Any) -> tuple[Any, Storage]:
    config = tiny(str(root), steps=7, checkpoint__keep=1, **({"publishing__average_last": 3} | settings))
    Watched().train(config)
    return config, Storage(config.storage)


def weights(config: Any, storage: Storage, manifest: CheckpointManifest) -> dict[str, Tensor]:
    with torch.device("meta"):
        state = Moonlight(config.model).state_dict()
    found = {name: torch.empty(tensor.shape) for name, tensor in state.items()}
    read_tensors(found, manifest, storage)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Storage]:
    return trained(tmp_path_factory.mktemp("average"))


def test_training_keeps_what_will_be_averaged(run: tuple[Any, Storage]):
    config, storage = run
    assert averaged_steps(config) == (4, 6, 7)
    assert named_steps(config) == {4, 6, 7}
    assert committed_steps(storage, "tiny") == [4, 6, 7]  # checkpoint.keep alone would leave the last


def test_it_is_bitwise_the_mean_in_fp32(run: tuple[Any, Storage]):
    config, storage = run
    made = make_average(config, storage)
    assert made.average_of == (4, 6, 7)
    parts = [
        weights(config, storage, manifest) for step in (4, 6, 7) if (manifest := read_manifest(storage, "tiny", step))
    ]
    found = weights(config, storage, made)
    assert found.keys() == parts[0].keys()
    for name, tensor in found.items():
        first, second, third = (part[name] for part in parts)
        assert torch.equal(tensor, (first + second + third) / 3), name
        assert tensor.dtype == torch.float32
    biases = [name for name in found if "e_score_correction_bias" in name]
    assert biases
    assert any(not torch.equal(parts[0][name], parts[2][name]) for name in biases)
    model = load_model(config, made, storage)
    assert torch.equal(model.lm_head.weight, found["lm_head.weight"])


def test_making_it_again_writes_nothing_and_a_killed_one_is_made_anew(run: tuple[Any, Storage]):
    config, storage = run
    made = make_average(config, storage)
    asked: list[str] = []
    assert make_average(config, storage, lambda name, *_: asked.append(name)) == made
    assert asked == []
    storage.delete("runs/tiny/average/step-00000007-last-3/manifest.json")
    assert read_average(storage, "tiny", 7, 3) is None

    def die(name: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_average(config, storage, die)
    assert read_average(storage, "tiny", 7, 3) is None
    again = make_average(config, storage)
    assert (again.digest, again.content_sha256) == (made.digest, made.content_sha256)
    assert [file.bytes for file in again.files] == [file.bytes for file in made.files]


def test_the_mean_of_other_checkpoints_is_not_this_one(tmp_path: Any):
    """It lies under the same name: of other steps, and of a run that was trained again, as a message about foreign checkpoints advises."""
    config, storage = trained(tmp_path)
    made = make_average(config, storage)
    assert chosen_checkpoint(config, storage) == made
    section = config.checkpoint.model_copy(update={"every_steps": 3, "keep": 9})
    often = config.model_copy(update={"checkpoint": section})
    assert averaged_steps(often) == (3, 6, 7)
    assert chosen_checkpoint(often, storage) is None
    storage.delete(train_folder("tiny"))
    other, _ = trained(tmp_path, seed=1)
    assert chosen_checkpoint(other, storage) is None
    again = make_average(other, storage)
    assert again.content_sha256 != made.content_sha256
    assert again.run_identity != made.run_identity
    assert chosen_checkpoint(other, storage) == again
    for step in (4, 6):
        storage.delete(step_folder("tiny", step))
    assert chosen_checkpoint(other, storage) == again


def test_one_tensor_is_in_memory_at_a_time(run: tuple[Any, Storage], monkeypatch: pytest.MonkeyPatch):
    """The largest live set of mean tensors: what the writer holds and the one that is being read."""
    config, storage = run
    storage.delete("runs/tiny/average/step-00000007-last-3/manifest.json")
    alive: list[Any] = []
    most = 0
    mean_of = average.mean_of

    def watched(*arguments: Any) -> Tensor:
        nonlocal most
        found = mean_of(*arguments)
        alive.append(weakref.ref(found))
        most = max(most, sum(each() is not None for each in alive))
        return found

    monkeypatch.setattr(average, "mean_of", watched)
    make_average(config, storage)
    assert len(alive) > 10
    assert most <= 2


def test_what_cannot_be_averaged(run: tuple[Any, Storage], tmp_path: Any):
    config, storage = run
    section = config.publishing.model_copy(update={"average_last": 5})
    with pytest.raises(ConfigError, match=r"publishing.average_last 5: up to step 7 the run takes 4 checkpoints"):
        averaged_steps(config.model_copy(update={"publishing": section}))
    section = config.publishing.model_copy(update={"average_last": 4})
    with pytest.raises(ConfigError, match=r"there is no checkpoint of step 2; there are \[4, 6, 7\]"):
        make_average(config.model_copy(update={"publishing": section}), storage)
    other = config.model_copy(update={"model": config.model.model_copy(update={"hidden_size": 24})})
    storage.delete("runs/tiny/average/step-00000007-last-3/manifest.json")
    with pytest.raises(ValueError, match=r"has embed_tokens.weight of shape \(64, 16\), expected \(64, 24\)"):
        make_average(other, storage)
