"""What a process pays before it does anything: torch (150 MB, seconds) only where something is computed, Ray only where it is used.

The whole debug pipeline has to fit into 4 GB with a dozen processes around the two that train.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

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


def test_the_driver_of_training_has_torch_but_not_the_trainer() -> None:
    """`TorchTrainer` brings torch; FSDP and DCP (50 MB) belong to the ranks alone."""
    code = "import sys, jobs.on_ray.train; print('torch' in sys.modules, 'torch.distributed.fsdp' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
