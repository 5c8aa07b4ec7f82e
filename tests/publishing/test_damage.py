"""Flips in what evaluate, publish and a run that starts from a model read: each is named with its file, none is used."""

from pathlib import Path

import pytest
import torch

from pipeline.config.load import validate
from pipeline.evaluation.heldout import evaluate
from pipeline.evaluation.result import manifest_path
from pipeline.evaluation.texts import read_heldout
from pipeline.model.moonlight import Moonlight
from pipeline.publishing import registry
from pipeline.publishing.export import publish
from pipeline.tokenizer import Encoder
from pipeline.training.trainer import import_weights
from tests.evaluation.make import MadeRun, make_run, run_config
from tests.flips import check_flips, is_blank


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> MadeRun:
    return make_run(run_config(str(tmp_path_factory.mktemp("damage"))))


@pytest.fixture(scope="module")
def published(run):
    evaluation = evaluate(run.config, run.dataset, run.checkpoint, run.storage, report=lambda _: None)
    return publish(run.config, run.train, evaluation, run.dataset, run.storage, report=lambda _: None)


@pytest.fixture(params=[12, pytest.param(300, marks=pytest.mark.long)])
def each_flip(request):
    """`each_flip(path, read)`: every one of so many random flips must be refused by a message with the file's name."""

    def check(path: Path, read, harmless=lambda data, byte: False) -> list[str]:
        return check_flips(path, read, request.param, harmless)

    return check


def test_held_out_rows(run, each_flip):
    source = run.dataset.sources[0]
    path = Path(run.storage.uri(source.heldout[0].path))
    each_flip(path, lambda: read_heldout(source, run.dataset, run.config, run.storage))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer(run, each_flip, name):
    each_flip(Path(run.storage.uri(f"tokenizers/t/{name}")), lambda: Encoder.stored(run.dataset.tokenizer, run.storage))


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("name", ["model-00001-of-*.safetensors", "config.json", "model.safetensors.index.json"])
def test_weights_that_a_run_starts_from(run, published, each_flip, name, pinned):
    """By the digest of their manifest, or a copy of the folder somewhere else."""
    folder = registry.folder(published.name, published.version)
    values = run.config.model_dump(mode="json")
    weights = f"{folder}@sha256:{published.digest}" if pinned else run.storage.uri(folder)
    values["training"]["initial_weights"] = weights
    config = validate(values)
    (path,) = Path(run.storage.uri(folder)).glob(name)

    def start() -> None:
        import_weights(Moonlight(config.model), config, run.storage)

    said = each_flip(path, start)
    if name.startswith("model-"):
        assert all("tensor '" in line or "header" in line for line in said)


def test_published_files(run, published, each_flip):
    folder = Path(run.storage.uri(registry.folder(published.name, published.version)))

    def up_to_date() -> None:
        registry.check(run.storage, published)

    for path in (folder / "model-00001-of-00002.safetensors", folder / "README.md"):
        if path.exists():
            each_flip(path, up_to_date)


def test_records(run, published, each_flip):
    folder = Path(run.storage.uri(registry.folder(published.name, published.version)))
    each_flip(folder / "manifest.json", lambda: registry.find(run.storage, published.name, published.version), is_blank)
    each_flip(folder.parent / "latest.json", lambda: registry.latest(run.storage, published.name), is_blank)
    path = manifest_path(run.config, run.checkpoint)
    again = lambda: evaluate(run.config, run.dataset, run.checkpoint, run.storage, report=print)  # noqa: E731
    each_flip(Path(run.storage.uri(path)), again, is_blank)


def test_a_model_starts_from_what_was_published(run, published):
    """The checks do not get into the way of sound weights."""
    values = run.config.model_dump(mode="json")
    values["training"]["initial_weights"] = registry.folder(published.name, published.version)
    config = validate(values)
    model = Moonlight(config.model)
    import_weights(model, config, run.storage)
    ours = model.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in run.model.state_dict().items())
    assert len(published.xxh3) > len(ours)
