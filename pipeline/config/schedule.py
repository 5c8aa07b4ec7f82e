"""Settings of what changes as training goes on: learning rate, batch, rate of the router's bias."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config.section import Section
from pipeline.config.values import NonNegativeFloat, PositiveInt


class LearningRateStage(Section):
    """From the end of the previous stage until position `until_tokens` the rate goes from `start` to `end`."""

    until_tokens: PositiveInt
    shape: Literal["constant", "linear", "cosine"]
    start: NonNegativeFloat
    end: NonNegativeFloat


class BatchStage(Section):
    until_tokens: PositiveInt
    sequences: PositiveInt  # global batch


class BiasRateStage(Section):
    until_tokens: PositiveInt
    rate: NonNegativeFloat  # u of the router's selection-bias update


class ScheduleConfig(Section):
    """Pure functions of the position, which counts slots: sequences so far times their length, padding included.

    `total_tokens` and every `until_tokens` are positions. The last one of each list must reach `total_tokens`.

    Here and in `corpus.mixture` a stage in YAML may say `until: 80%` (or `1/12`) instead of `until_tokens`: with another `total_tokens` the
    schedule then keeps its shape.
    """

    total_tokens: PositiveInt
    learning_rate: tuple[LearningRateStage, ...] = Field(min_length=1)
    global_batch: tuple[BatchStage, ...] = Field(min_length=1)
    bias_rate: tuple[BiasRateStage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _covers_the_run(self) -> ScheduleConfig:
        for name in ("learning_rate", "global_batch", "bias_rate"):
            ends = [stage.until_tokens for stage in getattr(self, name)]
            if any(later <= earlier for earlier, later in zip(ends, ends[1:])):
                raise ValueError(f"{name}: until_tokens must increase from stage to stage, got {ends}")
            if ends[-1] < self.total_tokens:
                raise ValueError(f"{name}: ends at {ends[-1]} tokens but total_tokens is {self.total_tokens}")
        return self
