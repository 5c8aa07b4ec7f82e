"""`moonlight ladder` on a real Ray: rungs are trained there as here, and a ladder that was killed goes on where it stood."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from jobs.on_ray.ladder import measure_with_ray
from pipeline.ladder.run import execute
from pipeline.ladder.rungs import Rung, configure
from pipeline.training.commits import train_folder
from tests.jobs.conftest import Prepared

ROOT = Path(__file__).parents[2]
TOKENS = 0.02  # a parameter: two or three steps
DONE = re.compile(r"^(\w+ d=\d+ .*): held-out loss (\S+), \d+ runs left of this round$")


@pytest.fixture
def ray_running():
    if ray.is_initialized():
        yield
        return
    environment = {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=128 << 20, runtime_env=environment
    )
    yield
    ray.shutdown()


def manifest_of(prepared: Prepared, rung: Rung) -> str:
    return f"{train_folder(configure(prepared.config, rung, TOKENS, prepared.dataset.digest).run_id)}/manifest.json"


def test_rungs_on_ray_are_the_rungs_here(prepared: Prepared, ray_running: None) -> None:
    rungs = [Rung("muon", 64, 2.0, seed=5), Rung("adamw", 64, 2.0, seed=5)]
    measure = measure_with_ray(prepared.config, prepared.dataset, TOKENS)
    there = measure(rungs)
    assert [there[rung].loss < 10 for rung in rungs] == [True, True]
    assert there[rungs[0]].beginning == there[rungs[1]].beginning
    before = [prepared.storage.read(manifest_of(prepared, rung)) for rung in rungs]
    values = configure(prepared.config, rungs[0], TOKENS, prepared.dataset.digest).model_dump(mode="json")
    assert execute(values, prepared.dataset.identity, "owner") == there[rungs[0]] == measure(rungs)[rungs[0]]
    assert [prepared.storage.read(manifest_of(prepared, rung)) for rung in rungs] == before


@pytest.mark.long
def test_a_killed_ladder_goes_on(prepared: Prepared) -> None:
    command = [sys.executable, "-m", "jobs.ladder", *prepared.arguments, "--sizes", "64,128", "--seeds", "2"]
    command += ["--rates", "1", "--tokens-per-parameter", str(TOKENS), "run_id=climbing"]
    options = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, "text": True}
    first: list[tuple[str, str]] = []
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        with subprocess.Popen(command, stdout=subprocess.PIPE, **options) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if found := DONE.findall(line):
                    first += found
                    process.send_signal(number)
        assert process.returncode == code
    assert len(first) >= 2
    kept = {
        path: path.stat().st_mtime_ns
        for path in Path(prepared.storage.root, "runs").glob("ladder-*/train/manifest.json")
    }
    assert len(kept) >= len(dict(first))

    again = subprocess.run(command, stdout=subprocess.PIPE, check=True, **options)
    second = dict(found for line in again.stdout.splitlines() for found in DONE.findall(line))
    assert len(second) == 8
    assert {name: second[name] for name, _ in first} == dict(first)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # nothing that was done was done again
    record = json.loads(prepared.storage.read("ladders/climbing/ladder.json"))
    assert {run["rung"]: f"{run['loss']:.4f}" for run in record["runs"]} == second
    assert prepared.storage.read("ladders/climbing/ladder.png").startswith(b"\x89PNG")
