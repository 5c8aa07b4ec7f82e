"""The parts of the GPU benchmark that need no GPU."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import layers_that_fit, shrink_to_fit
from benchmarks.gpu_parity import CHECKS, Off, distance, parity
from pipeline.config.load import load_config


def test_layers_fill_the_memory():
    """2.28 GB a mixture layer (571 M parameters, weight and gradient in bf16) and 1.39 GB of activations at 8,192 tokens."""
    config = load_config("moonlight-16b-a3b").model
    assert layers_that_fit(config, 8192, 10**9) == 2
    assert layers_that_fit(config, 8192, 85 * 10**9) == 1 + int((0.85 * 85 - 3.02) / 3.68)
    assert layers_that_fit(config, 8192, 10**12) == 27


def test_fewer_layers_are_tried_until_they_fit():
    tried = []

    def measure(count: int) -> tuple[float, int]:
        tried.append(count)
        if count > 4:
            raise torch.OutOfMemoryError
        return 0.5, 100

    assert shrink_to_fit(measure, 9) == (3, 0.5, 100)
    assert tried == [9, 7, 5, 3]


def test_memory_too_small_for_two_layers_is_reported():
    def measure(count: int) -> tuple[float, int]:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        shrink_to_fit(measure, 5)


@pytest.mark.parametrize(
    "check", [pytest.param(c, marks=[pytest.mark.long] * (c.__name__ == "compilation")) for c in CHECKS],
    ids=lambda check: check.__name__,
)  # fmt: skip
def test_the_proof_runs_through_and_holds_on_a_cpu(check):
    assert parity(check, torch.device("cpu"))["met"]


def test_a_proof_that_does_not_hold_says_so(capsys):
    def wrong(device):
        yield "right", Off(0.0, 0.0)
        yield "wrong", Off(distance(torch.tensor([1.0, torch.nan]), torch.ones(2)), 0.1)

    record = parity(wrong, torch.device("cpu"))
    assert (record["met"], record["ours"]) == (False, float("inf"))
    assert "NOT MET" in capsys.readouterr().out


def test_graphs_are_measured_where_there_are_any():
    on_gpu, on_cpu = (set(gpu.all_rows(torch.device(kind), tiny=True)) for kind in ("cuda", "cpu"))
    assert on_gpu - on_cpu == {"layers 64 eager graph", "layers 64 compiled graph"}
    assert not on_cpu - on_gpu


def test_waits_of_the_host_are_counted():
    def step() -> None:
        for _ in range(3):
            torch.ones(()).item()

    assert gpu.host_waits(step, torch.device("cpu")) == 3


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_tiny_mode_runs_through():
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    records = json.loads(done.stdout.splitlines()[-1])
    names = [record["benchmark"] for record in records]
    assert {f"gpu/parity/{check.__name__}" for check in CHECKS} <= set(names)
    rows = [record for record in records if record["benchmark"].startswith("gpu/layers/")]
    assert [record["benchmark"].rsplit("/")[-1] for record in rows] == ["eager", "compiled", "selective"] * 2
    assert all(record["rehearsed_peak_bytes"] > 0 for record in rows)
