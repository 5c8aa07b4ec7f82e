"""What a process pays before it does anything: torch (150 MB, seconds) only where something is computed, Ray only where it is used.

The whole debug pipeline has to fit into 4 GB with a dozen processes around the two that train.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import stages
from jobs.first_line import config_of
from tests.jobs.conftest import LOOKING

HEAVY = {
    "torch",
    "transformers",
    "pandas",
    "sympy",
    "matplotlib",
    "ray",
    "kubernetes",
    "pyarrow.dataset",
    "safetensors",
    "lm_eval",
    "datasets",
}


def loaded_by(module: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after importing the module."""
    code = f"import json, sys, {module}; print(json.dumps(sorted(set(sys.modules) & set({sorted(HEAVY)!r}))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    ("module", "needed"),
    [
        ("jobs.pipeline", set()),
        ("jobs.stages", set()),  # unpickled with the progress callbacks, in actors of Ray as well
        ("jobs.status", set()),
        ("jobs.logs", set()),
        ("jobs.prepare", set()),
        ("jobs.drivers.kuberay", {"kubernetes"}),
        ("jobs.train", set()),
        ("jobs.evaluate", set()),
        ("jobs.publish", set()),
        ("jobs.on_ray.evaluate", {"ray"}),
        ("jobs.on_ray.publish", {"ray"}),
        ("data_prep.mapping", set()),  # what a prepare task unpickles
    ],
)
def test_loads_only_what_it_needs(module: str, needed: set[str]) -> None:
    assert loaded_by(module) == needed


FIRST_LINE = """
import builtins, json, runpy, sys
def first(*said, **_):
    builtins.print = plain
    print(json.dumps([*said, sorted(sys.modules)]))
    raise SystemExit(0)
plain, builtins.print = print, first
module, sys.argv = sys.argv[1], ["jobs", *sys.argv[2:]]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
SLOW = HEAVY | {"pydantic", "numpy", "pyarrow", "botocore", "fsspec", "asyncio", "psutil", "yaml", "urllib.request"}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["jobs", "run"], LOOKING),
        (["jobs.pipeline"], LOOKING),
        (["jobs", "train"], LOOKING),
        *(([f"jobs.{stage}"], LOOKING) for stage in stages.names()),
        (["jobs", "check"], LOOKING),
        (["jobs.plan"], "debug: planning\n"),
        (["jobs.verify"], "debug: reading what is to be verified\n"),
    ],
    ids=lambda given: "-".join(given) if isinstance(given, list) else "",
)
def test_the_first_line_comes_before_anything_slow(command: list[str], said: str, tmp_path: Path) -> None:
    """Counted rather than timed: what a bare Python with argparse has, none of what takes a while to import, no storage."""
    arguments = [*command, "--config", "debug", f"storage.root={tmp_path / 'root'}"]
    done = subprocess.run([sys.executable, "-c", FIRST_LINE, *arguments], capture_output=True, text=True, check=True)
    line, modules = json.loads(done.stdout)
    assert f"{line}\n" == said
    assert set(modules) & SLOW == set()
    assert len(modules) < 200
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        (["--config", "debug"], "debug"),
        (["--config=my/run.yaml", "a.b=c"], "my/run.yaml"),
        (["--conf", "x", "--config", "y"], "y"),
        (["--config"], None),
        (["a.b=--config"], None),
        (["--", "-"], None),
    ],
)
def test_the_configuration_is_found_as_argparse_finds_it(arguments: list[str], config: str | None) -> None:
    assert config_of(arguments) == config


def test_the_driver_of_training_has_torch_but_not_the_trainer() -> None:
    """`TorchTrainer` brings torch; FSDP and DCP (50 MB) belong to the ranks alone."""
    code = "import sys, jobs.on_ray.train; print('torch' in sys.modules, 'torch.distributed.fsdp' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
