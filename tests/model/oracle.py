"""The oracle: transformers' `DeepseekV3ForCausalLM` with the weights of one of our models."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from pipeline.config.schema import ModelConfig
from pipeline.model.hf import hf_config, hf_name
from pipeline.model.moonlight import Moonlight


def small_config(**changes: object) -> ModelConfig:
    """Three layers (one dense), every dimension different from its neighbours."""
    fields: dict = {
        "vocab_size": 96,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 20,
        "intermediate_size": 80,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "max_position_embeddings": 128,
    }
    return ModelConfig.model_validate(fields | changes)


def random_model(config: ModelConfig, seed: int = 0, aux_loss_weight: float = 0.0) -> Moonlight:
    """Weights larger than at the start of training and biases that matter, so that every path counts."""
    model = Moonlight(config, aux_loss_weight=aux_loss_weight)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.08, generator=generator)
        for _, router in model.routers():
            router.weight.normal_(0.0, 0.5, generator=generator)
            router.e_score_correction_bias.uniform_(-0.2, 0.2, generator=generator)
    return model


def oracle_of(model: Moonlight) -> DeepseekV3ForCausalLM:
    """transformers' model holding the same weights (its experts are stacks with gate and up fused)."""
    config = hf_config(model.config, bos_token_id=None, eos_token_id=1, dtype="float32")
    oracle = DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(config))
    oracle.load_state_dict(dict(_as_oracle(dict(model.state_dict()))))
    return oracle


def oracle_gradients(oracle: DeepseekV3ForCausalLM) -> dict[str, Tensor]:
    """Gradients of the oracle by its parameter names."""
    return {name: parameter.grad for name, parameter in oracle.named_parameters()}


def gradients_as_oracle(model: Moonlight) -> dict[str, Tensor]:
    return dict(_as_oracle({name: parameter.grad for name, parameter in model.named_parameters()}))


def _as_oracle(tensors: dict[str, Tensor]):
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_proj"):
            up = tensors[name.replace("gate_proj", "up_proj")]
            yield "model." + name.replace("gate_proj", "gate_up_proj"), torch.cat([tensor, up], dim=1)
        elif name.endswith("experts.down_proj"):
            yield "model." + name, tensor
        elif not name.endswith("experts.up_proj"):
            yield hf_name(name), tensor
