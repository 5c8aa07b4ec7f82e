"""`python -m pipeline.training`: exit codes and one-line errors, alone and under torchrun."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.load import dump_yaml
from pipeline.manifest import TrainManifest
from pipeline.storage import Storage
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
    ],
)
def test_wrong_input_is_one_line(run, capsys, change, message):
    _, arguments = run()
    assert main([*arguments, *change]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


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
    assert process.stdout.readline().startswith("step 1/20000  loss 4.")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 3, errors
    (manifest,) = committed(storage, "tiny")
    assert f"stopped after step {manifest.step};" in errors
