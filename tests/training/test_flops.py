import torch

from pipeline.config.load import load_config
from pipeline.model.moonlight import Moonlight
from pipeline.training.flops import active_parameters, flops_per_token


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
