"""`python -m pipeline.training`: exit codes and one-line errors, alone and under torchrun."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.config.load import dump_yaml
from pipeline.manifest import TrainManifest
from pipeline.storage import Storage
from pipeline.training import trainer
from pipeline.training.__main__ import main
from pipeline.training.commits import committed
from tests.training.make import tiny, tiny_dataset

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run(tmp_path):
    """A configuration file and a dataset manifest, as arguments."""

    def prepare(**overrides):
        config = tiny(str(tmp_path / "root"), **overrides)
        (tmp_path / "run.yaml").write_text(dump_yaml(config))
        storage = Storage(config.storage)
        storage.write("datasets/tiny/dataset.json", tiny_dataset(storage).to_json())
        return storage, ["--config", str(tmp_path / "run.yaml"), "--dataset", "datasets/tiny/dataset.json"]

    return prepare


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--dataset", "datasets/none.json"], "run the prepare stage first"),
        (["model.hiden_size=3"], "model.hiden_size: unknown key; did you mean 'hidden_size'?"),
        (["parallelism.shard=2"], "replicate 1 * shard 2 = 2 ranks, but 1 are running"),
        (["corpus.sources.0.max_epochs=0.01"], "max_epochs is 0.01"),
        (["training.compute_dtype=bf16"], "start with torchrun --nproc-per-node 1"),
        (["training.initial_weights=/nowhere"], "/nowhere: no *.safetensors file; give a Hugging Face model folder"),
        (["model.vocab_size=32"], "model.vocab_size 32 is too small for the dataset, whose tokenizer has 64 tokens"),
        pytest.param(
            ["cluster.use_gpu=true"],
            "sees 0 GPUs here, but rank 0 of this machine wants one",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_wrong_input_is_one_line(run, capsys, change, message):
    _, arguments = run()
    assert main([*arguments, *change]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.fixture
def infinite(monkeypatch):
    """Weights that have become infinite: no step can happen any more."""
    build = trainer.build

    def damaged(*args):
        model, optimizer = build(*args)
        model.norm.weight.data.fill_(torch.inf)
        return model, optimizer

    monkeypatch.setattr(trainer, "build", damaged)


def test_a_checkpoint_of_skipped_steps_has_no_loss_rather_than_the_best(run, infinite):
    storage, arguments = run(training__max_skipped_steps=100)
    assert main(arguments) == 0
    train = TrainManifest.parse(storage.read("runs/tiny/train/manifest.json"), "train")
    assert (train.skipped_steps, train.checkpoint.loss) == (train.steps, None)


def test_too_many_skipped_steps_are_one_line(run, capsys, infinite):
    _, arguments = run(training__max_skipped_steps=2)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: step 2: the last 2 steps had a non-finite loss or gradient and were skipped")
    assert error.count("\n") == 1


def test_says_where_it_is(run, capsys):
    _, arguments = run()
    for expected in ("from the beginning", "going on after step 4"):
        assert main(arguments) == 0
        first, *_, last = capsys.readouterr().out.splitlines()
        assert first == f"run tiny: 512 tokens on 1 CPU ranks (replicate 1, shard 1, ep 1), {expected}"
        assert last.startswith("complete: 4 steps, checkpoint ")


def test_torchrun(run):
    storage, arguments = run(steps=2, parallelism={"shard": 2, "ep": 2})
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "pipeline.training",
    ]
    done = subprocess.run([*command, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    manifest = TrainManifest.model_validate_json(storage.read("runs/tiny/train/manifest.json"))
    assert manifest.checkpoint.world_size == 2
    assert f"complete: 2 steps, checkpoint {manifest.checkpoint.content_sha256}" in done.stdout


def test_sigterm_saves_and_leaves(run):
    storage, arguments = run(
        steps=20_000, corpus__sources=[{"name": f"s{i}", "path": "none", "max_epochs": 1e6} for i in (0, 1)]
    )
    command = [sys.executable, "-m", "pipeline.training", *arguments, "checkpoint.every_steps=100000"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("run tiny: ")
    assert process.stdout.readline().startswith("step 1/20000  loss 4.")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 3, errors
    (manifest,) = committed(storage, "tiny")
    assert f"stopped after step {manifest.step};" in errors
