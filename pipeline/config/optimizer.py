"""Settings of the optimizers."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from pipeline.config.section import Section
from pipeline.config.values import Bytes, Count, Fraction, NonNegativeFloat, PositiveFloat


class MuonConfig(Section):
    momentum: Fraction = 0.95
    nesterov: bool = True
    newton_schulz: Literal["moonlight", "polar_express"] = "moonlight"  # coefficients
    newton_schulz_steps: Count = 5
    backend: Literal["plain", "gram"] = "plain"  # how the iteration is evaluated
    products: Literal["auto", "half", "fp32"] = "auto"  # half: 16-bit; auto: half where the device has kernels for them
    blocks: Literal["whole", "per_head"] = "whole"  # Moonlight orthogonalises whole matrices
    update_rms: PositiveFloat = 0.2  # the 0.2 of 0.2 * sqrt(max(rows, cols))
    wire_dtype: Literal["bf16", "fp32"] = "bf16"
    momentum_dtype: Literal["bf16", "fp32"] = "fp32"  # as it is kept between steps, also in checkpoints
    bucket_bytes: Bytes = 128 * 1024 * 1024  # cap of one exchange buffer
    # Replicas share the Newton-Schulz work. auto: of matrices that travel anyway, which never loses; on: of experts, too, as
    # far as twice the bytes go that a rank sends while replicas repeat the work
    hsdp_split: Literal["auto", "on", "off"] = "auto"

    @field_validator("hsdp_split", mode="before")
    @classmethod
    def _yaml_reads_on_as_true(cls, value: object) -> object:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class AdamWConfig(Section):
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: PositiveFloat = 1e-8


class OptimizerConfig(Section):
    """Muon for matrices, AdamW for the rest, with one learning rate and one weight decay (Moonlight's rule)."""

    name: Literal["muon", "adamw"] = "muon"  # adamw: every parameter, for comparisons
    weight_decay: NonNegativeFloat = 0.1
    gradient_clip: NonNegativeFloat = 1.0  # global norm; 0 means no clipping
    muon: MuonConfig = MuonConfig()
    adamw: AdamWConfig = AdamWConfig()
    qk_clip: PositiveFloat | None = None  # K2's threshold on attention logits (100); None: off
