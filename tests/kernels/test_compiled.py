"""Triton's compiler and NVIDIA's assembler take every kernel, without a GPU: for Hopper always, else in long tests."""

import json
import subprocess
import sys

import pytest

SHARED = {89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a program may have, by compute capability


@pytest.mark.parametrize(
    "capability", [pytest.param(89, marks=pytest.mark.long), 90, pytest.param(100, marks=pytest.mark.long)]
)
def test_every_kernel_compiles(capability):
    command = [sys.executable, "-m", "tests.kernels.compiled", str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {row.pop("kernel"): row for row in map(json.loads, done.stdout.splitlines())}
    assert len(found) == 12
    for name, row in found.items():
        assert row["machine_code"] > 1000, name
        assert row["spills"] == 0, name
        assert row["shared"] <= SHARED[capability], name
    product = found["grouped_fp8_triton._product"]
    assert product["asynchronous"] > 0  # factors are brought while others are multiplied
    assert (product["products_e4m3"] > 0) == (capability < 100)  # Blackwell's say "f8f6f4"
