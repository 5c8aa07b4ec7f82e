"""Settings of what follows training: evaluation and publishing."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from pipeline.config.section import Section
from pipeline.config.values import Bytes, Count, Location, PositiveFloat, PositiveInt


class EvaluationConfig(Section):
    sequence_length: PositiveInt | None = None  # window of held-out text; None: training.sequence_length
    max_tokens_per_source: PositiveInt = 10_000_000
    batch: Count = 8  # windows per forward pass
    checkpoint: Literal["last"] | Annotated[int, Field(gt=0)] = "last"  # or a step
    tasks: tuple[str, ...] = ()  # of lm-eval, to be scored as well: names of tasks, groups or tags
    task_folder: Location | None = None  # folder or s3:// prefix with own tasks (lm-eval's YAML) and their data
    few_shot: Annotated[int, Field(ge=0)] | None = None  # examples before each question; None: what each task says
    task_limit: PositiveInt | None = None  # documents of each task; None: all

    @field_validator("tasks")
    @classmethod
    def _tasks_differ(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in tasks if tasks.count(name) > 1})
        if twice:
            raise ValueError(f"tasks: {twice[0]!r} is named twice")
        return tasks


# Of EvaluationConfig; without tasks they mean nothing.
TASK_SETTINGS = frozenset({"tasks", "task_folder", "few_shot", "task_limit"})


class PublishingConfig(Section):
    name: str = "moonlight"  # of the folder below models/
    max_loss: PositiveFloat | None = None  # gate on the held-out loss (nats per token)
    promote: bool = True  # move latest.json to the new version
    shard_bytes: Bytes = 5_000_000_000  # of one safetensors file
    dtype: Literal["fp32", "bf16"] = "bf16"
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: Count = 64

    @field_validator("name")
    @classmethod
    def _name_is_a_path_segment(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", name):
            raise ValueError(f"name {name!r} must be 1-96 letters, digits, '.', '_' or '-': it names a folder")
        return name
