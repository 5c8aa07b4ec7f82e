"""Which products a device is given: its own where it has them, the safe ones where it is unknown, none that it lacks."""

import os
import subprocess
import sys

import pytest
import torch

from pipeline.config.schema import MuonConfig, OptimizerConfig
from pipeline.optim import products
from pipeline.optim.muon import build_optimizer
from pipeline.optim.products import choose, dtype_of, one_thread_each
from pipeline.optim.rules import Rule

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False])
def has(request, monkeypatch):
    """A CPU with or without kernels for bf16 and fp16."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for asked in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, asked, lambda: request.param)
    products.has_products.cache_clear()
    yield request.param
    products.has_products.cache_clear()


@pytest.mark.parametrize(("backend", "half"), [("plain", "bf16"), ("gram", "fp16")])
def test_the_device_decides_unless_forced(has, backend, half):
    assert choose("auto", backend, CPU) == ("half" if has else "fp32")
    assert dtype_of(choose("auto", backend, CPU), backend) == (half if has else "fp32")
    assert choose("fp32", backend, CPU) == "fp32"
    if has:
        assert choose("half", backend, CPU) == "half"
        return
    message = rf"optimizer.muon.products is 'half', but this cpu device \(.*\) has no {half} matrix product, which optimizer.muon.backend '{backend}'"
    with pytest.raises(ValueError, match=message):
        choose("half", backend, CPU)
    weight = torch.nn.Parameter(torch.ones(2, 2))
    config = OptimizerConfig(muon=MuonConfig(backend=backend, products="half"))
    with pytest.raises(ValueError, match=message):
        build_optimizer([("w", weight)], config, [Rule("*", "muon")])


def test_unknown_processors_take_the_safe_path(monkeypatch):
    assert not products.has_products("xpu", torch.bfloat16)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    products.has_products.cache_clear()
    assert choose("auto", "plain", CPU) == "fp32"
    products.has_products.cache_clear()


def test_torch_without_avx512_is_known_to_lack_them():
    """What the choice believes of torch: capped to AVX2, it says so itself. A process of its own, as it asks once."""
    asked = (
        "import torch; from pipeline.optim.products import choose; print(choose('auto', 'plain', torch.device('cpu')))"
    )
    capped = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    out = subprocess.run([sys.executable, "-c", asked], env=capped, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "fp32"


def test_work_on_one_thread_each_keeps_order_and_raises():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        rows = [torch.full((), float(i)) for i in range(7)]
        found = one_thread_each(lambda row: torch.tensor([row.item(), torch.get_num_threads()]), rows)
        assert [pair.tolist() for pair in found] == [[i, 1] for i in range(7)]
        with pytest.raises(ZeroDivisionError):
            one_thread_each(lambda row: torch.ones(()) if row else 1 / 0, rows)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
