import math

import pytest
import torch

from pipeline.config.load import load_config
from pipeline.model.moonlight import Moonlight
from pipeline.rehearsal.chips import FOLDER, load_chip
from pipeline.training.flops import active_parameters, flops_per_token, peak_flops


@pytest.mark.parametrize(
    ("chip", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_peaks_are_those_of_the_data_sheets(chip, teraflops):
    assert peak_flops(chip) == teraflops * 1e12


def test_a_processor_that_is_not_in_the_table_has_no_peak():
    assert math.isnan(peak_flops("NVIDIA T4"))
    assert math.isnan(peak_flops("cpu"))


def test_rehearsals_count_by_the_same_peaks():
    chips = [load_chip(path.stem) for path in FOLDER.glob("*.yaml")]
    assert {chip.name: chip.peak_tflops * 1e12 for chip in chips} == {
        chip.name: peak_flops(chip.name) for chip in chips
    }


def test_published_figures_of_the_real_model():
    config = load_config("moonlight-16b-a3b").model
    assert active_parameters(config) == 2_243_685_888
    assert round(flops_per_token(config, 4096) / 1e9, 2) == 17.17
    assert round(flops_per_token(config, 8192) / 1e9, 2) == 18.87
    assert abs(flops_per_token(config, 4096) * 22_528 - 386.6e12) < 0.5e12  # Megatron-Bridge's card


def test_active_parameters_are_those_of_the_network():
    config = load_config("debug").model
    with torch.device("meta"):
        model = Moonlight(config)
    active = sum(
        p.numel() * config.num_experts_per_tok // config.n_routed_experts if p.dim() == 3 else p.numel()
        for name, p in model.named_parameters()
        if name not in ("embed_tokens.weight", "lm_head.weight")
    )
    assert active_parameters(config) == active
