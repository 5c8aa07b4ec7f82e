"""Settings of the network. Fields are named as in Hugging Face's `DeepseekV3Config`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from pipeline.config.section import Section
from pipeline.config.values import Count, PositiveFloat, PositiveInt


class ModelConfig(Section):
    """Moonlight's network (`DeepseekV3ForCausalLM`), field names as in its config.json."""

    vocab_size: Annotated[int, Field(gt=0, le=10_000_000)] = 163_840
    hidden_size: Count = 2048
    num_hidden_layers: Annotated[int, Field(gt=0, le=1000)] = 27
    num_attention_heads: Count = 16
    kv_lora_rank: Count = 512
    qk_nope_head_dim: Count = 128
    qk_rope_head_dim: Count = 64
    v_head_dim: Count = 128
    intermediate_size: Count = 11_264  # dense layers
    moe_intermediate_size: Count = 1408  # one expert
    n_routed_experts: Count = 64
    n_shared_experts: Count = 2
    num_experts_per_tok: Count = 6
    first_k_dense_replace: Annotated[int, Field(ge=0)] = 1
    routed_scaling_factor: PositiveFloat = 2.446
    norm_topk_prob: bool = True
    rms_norm_eps: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 50_000.0
    max_position_embeddings: PositiveInt = 8192
    initializer_range: PositiveFloat = 0.02

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def shared_intermediate_size(self) -> int:
        """The shared experts are one fused MLP."""
        return self.n_shared_experts * self.moe_intermediate_size

    @model_validator(mode="after")
    def _possible(self) -> ModelConfig:
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds n_routed_experts {self.n_routed_experts}"
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace {self.first_k_dense_replace} exceeds num_hidden_layers {self.num_hidden_layers}"
            )
        for name in ("hidden_size", "moe_intermediate_size"):
            if getattr(self, name) % 8:
                raise ValueError(
                    f"{name} {getattr(self, name)} must be a multiple of 8: the experts' grouped products take rows of whole 16 bytes"
                )
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim {self.qk_rope_head_dim} must be even: rotary embedding turns pairs")
        return self
