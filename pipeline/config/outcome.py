"""Settings of what follows training: evaluation and publishing."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.gates import GateConfig
from pipeline.config.section import Section
from pipeline.config.values import Bytes, Count, Location, PositiveFloat, PositiveInt

Shots = Annotated[int, Field(ge=0)]

# Table 5 of the Moonlight paper (arXiv 2502.16982), as lm-eval names its tasks; the data are on the Hugging Face Hub. HumanEval
# and MBPP run code that the model wrote, and lm-eval has no CMath. Of MATH the paper does not say the examples: lm-eval's four.
PAPER_SHOTS = {
    "mmlu": 5, "mmlu_pro": 5, "bbh_cot_fewshot": 3, "triviaqa": 5, "gsm8k": 4, "minerva_math": 4, "ceval-valid": 5, "cmmlu": 5,
}  # fmt: skip


def with_preset_tasks(values: dict[str, Any]) -> dict[str, Any]:
    """A run's plain values, with what `evaluation.task_preset` stands for where no tasks are given."""
    evaluation = values.get("evaluation")
    if not isinstance(evaluation, dict) or evaluation.get("task_preset") != "moonlight" or evaluation.get("tasks"):
        return values
    shots = evaluation.get("few_shot")
    filled = {**evaluation, "tasks": list(PAPER_SHOTS), "few_shot": PAPER_SHOTS if shots is None else shots}
    return {**values, "evaluation": filled}


class EvaluationConfig(Section):
    sequence_length: PositiveInt | None = None  # window of held-out text; None: training.sequence_length
    max_tokens_per_source: PositiveInt = 10_000_000
    batch: Count = 8  # windows per forward pass
    checkpoint: Literal["last"] | Annotated[int, Field(gt=0)] = "last"  # or a step
    tasks: tuple[str, ...] = ()  # of lm-eval, to be scored as well: names of tasks, groups or tags
    task_folder: Location | None = None  # folder or s3:// prefix with own tasks (lm-eval's YAML) and their data
    few_shot: Shots | dict[str, Shots] | None = (
        None  # examples before each question, of all or by task; None: what each task says
    )
    task_preset: Literal["moonlight"] | None = (
        None  # the paper's tasks with its numbers of examples, where tasks are not given
    )
    task_limit: PositiveInt | None = None  # documents of each task; None: all
    follow: bool = False  # judge every checkpoint while training goes on, not the chosen one after its end alone
    waiting: Count = 8  # checkpoints without a result that training keeps for a follower beyond checkpoint.keep
    tasks_every: PositiveInt | None = (
        None  # steps: tasks also of checkpoints that are multiples of it; None: of the chosen one
    )
    scoring_tasks: Count = 1  # without GPUs: Ray tasks that share the held-out text, each with the whole network

    @model_validator(mode="after")
    def _shots_are_of_tasks(self) -> EvaluationConfig:
        unknown = sorted(set(self.few_shot) - set(self.tasks)) if isinstance(self.few_shot, dict) else []
        if unknown:
            raise ValueError(f"few_shot: {unknown[0]!r} is not in tasks, which are {list(self.tasks)}")
        return self

    @field_validator("tasks")
    @classmethod
    def _tasks_differ(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in tasks if tasks.count(name) > 1})
        if twice:
            raise ValueError(f"tasks: {twice[0]!r} is named twice")
        return tasks


# Of EvaluationConfig; without tasks they mean nothing.
TASK_SETTINGS = frozenset({"tasks", "task_folder", "few_shot", "task_limit", "task_preset"})


class HubConfig(Section):
    """Where versions are published besides the storage. Endpoint and token: HF_ENDPOINT and HF_TOKEN, where the stage runs."""

    repo: str | None = None  # namespace/name on the Hugging Face hub
    revisions: Literal["branches", "tags"] = "branches"  # what a version's step-00000120 is there
    private: bool = True  # if the repository has to be made

    @field_validator("repo")
    @classmethod
    def _repo_has_a_namespace(cls, repo: str | None) -> str | None:
        name = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
        if repo is not None and not re.fullmatch(f"{name}/{name}", repo):
            raise ValueError(f"repo {repo!r} must be namespace/name, as in the address of its page")
        return repo


class CardConfig(Section):
    """What only people know of a model, for its card. What is not given is not said."""

    license: str | None = None  # the hub's identifier: apache-2.0, mit, other
    languages: tuple[str, ...] = ()  # ISO 639-1 codes: en, zh
    intended_use: str | None = None
    limits: str | None = None
    hardware: str | None = None  # what it was trained on


class PublishingConfig(Section):
    name: str = "moonlight"  # of the folder below models/
    max_loss: PositiveFloat | None = None  # gate on the held-out loss (nats per token)
    average_last: Annotated[int, Field(ge=2, le=1000)] | None = (
        None  # the mean of the weights of so many checkpoints is published
    )
    gates: tuple[GateConfig, ...] = ()  # all must be open
    promote: bool = True  # move latest.json to the new version
    beats_frequencies: bool = True  # a model that is worse than token frequencies is not promoted
    shard_bytes: Bytes = 5_000_000_000  # of one safetensors file
    dtype: Literal["fp32", "bf16"] = "bf16"
    workers: Count | None = None  # tasks that write weight files at a time; None: as many as there are training workers
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: Count = 64
    revisions: bool = False  # publish every kept checkpoint that has been evaluated as well, each under its step
    gguf: bool = False  # also one file for llama.cpp; needs the `gguf` extra
    hub: HubConfig = HubConfig()
    card: CardConfig = CardConfig()

    @field_validator("name")
    @classmethod
    def _name_is_a_path_segment(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", name):
            raise ValueError(f"name {name!r} must be 1-96 letters, digits, '.', '_' or '-': it names a folder")
        return name
