"""The rungs of a ladder: a run's recipe at other sizes, tokens, rates and batches, all else equal.

A size is a hidden size. Heads keep their width, so their number goes with it, and so do the widths of feed-forward layers and of
the latent; depth, experts and the tokenizer stay. Tokens are a multiple of the parameters that a token passes through (with embedding
and head). Schedules keep their shape: each boundary and rate is scaled.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config.load import ConfigError, validate
from pipeline.config.schema import TASK_SETTINGS, ModelConfig, RunConfig
from pipeline.manifest import digest_of
from pipeline.training.flops import active_parameters, flops_per_token
from pipeline.training.identity import identity_of

OPTIMIZERS = ("muon", "adamw")
ORDER = {
    "sequence_length",
    "rows_per_group",
    "lanes",
    "window_blocks",
    "mixture_block",
}  # constants of dataset/order.py


@dataclass(frozen=True)
class Beginning:
    """What runs must have in common that are compared."""

    loss: float  # of the first training step
    order_digest: str


@dataclass(frozen=True)
class Measured:
    """What a run came to."""

    flops: float  # of its training
    loss: float  # held out, nats per token; infinite: it diverged
    beginning: Beginning | None  # None: it diverged


@dataclass(frozen=True)
class Rung:
    """One run."""

    optimizer: str
    hidden: int
    rate: float  # times the recipe's
    batch: float = 1.0  # times the recipe's
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.optimizer} d={self.hidden} rate={self.rate:g} batch={self.batch:g} seed={self.seed}"


def at_size(model: ModelConfig, hidden: int) -> dict[str, int]:
    """The settings of the network that change. Raises ConfigError for a size that is no number of heads."""
    head = model.hidden_size // model.num_attention_heads
    if hidden % head:
        raise ConfigError(f"--sizes {hidden}: must be a multiple of {head}, the hidden size a head has in the recipe")

    def part(width: int) -> int:
        return max(8, round(width * hidden / model.hidden_size / 8) * 8)

    return {
        "hidden_size": hidden,
        "num_attention_heads": hidden // head,
        "kv_lora_rank": part(model.kv_lora_rank),
        "intermediate_size": part(model.intermediate_size),
        "moe_intermediate_size": part(model.moe_intermediate_size),
    }


def configure(recipe: RunConfig, rung: Rung, tokens_per_parameter: float, dataset_digest: str) -> RunConfig:
    """The run of a rung, in one process. Its name holds a digest of all that decides its loss, so what is done is found again.

    Raises ConfigError for a size or a recipe that no ladder can have.
    """
    for key in ("initial_weights", "start_from"):
        if getattr(recipe.training, key) is not None:
            raise ConfigError(f"training.{key}: runs of a ladder have other sizes and start afresh; set it to null")
    values: dict[str, Any] = recipe.model_dump(mode="json")
    values["model"] |= at_size(recipe.model, rung.hidden)
    model = ModelConfig.model_validate(values["model"])
    length = recipe.training.sequence_length
    base = max(stage.sequences for stage in recipe.schedule.global_batch)
    sequences = max(1, round(base * rung.batch))
    steps = max(1, round(tokens_per_parameter * parameters(model) / (sequences * length)))
    total = steps * sequences * length
    factor = total / recipe.schedule.total_tokens

    def until(stage: dict[str, Any]) -> dict[str, Any]:
        return {**stage, "until_tokens": max(1, round(stage["until_tokens"] * factor))}

    schedule = values["schedule"]
    schedule["total_tokens"] = total
    schedule["learning_rate"] = [
        {**until(stage), "start": stage["start"] * rung.rate, "end": stage["end"] * rung.rate}
        for stage in schedule["learning_rate"]
    ]
    schedule["bias_rate"] = [until(stage) for stage in schedule["bias_rate"]]
    values["corpus"]["mixture"] = [until(stage) for stage in values["corpus"]["mixture"]]
    schedule["global_batch"] = [{"until_tokens": total, "sequences": sequences}]
    for stages in (schedule["learning_rate"], schedule["bias_rate"], values["corpus"]["mixture"]):
        if stages:
            stages[-1]["until_tokens"] = max(total, stages[-1]["until_tokens"])
    values["optimizer"]["name"] = rung.optimizer
    values["seed"] = recipe.seed + rung.seed
    values["parallelism"] = {}
    micro = max(size for size in range(1, recipe.training.micro_batch + 1) if sequences % size == 0)
    values["training"] |= {
        "micro_batch": micro,
        "log_every": max(1, steps // 20),
        "profile": None,
        "recompute_every": None,
        "interleave": False,  # of ep ranks
    }
    values["checkpoint"] |= {"keep": 1, "keep_every": None}
    values["evaluation"] |= {"follow": False, "checkpoint": "last", **dict.fromkeys(TASK_SETTINGS), "tasks": []}
    values["corpus"]["decontamination"] = None  # looks for the questions of tasks, in prepare
    values["publishing"] |= {"gates": [], "average_last": None}
    values["tracking"] = {}
    config = validate(values)
    decisive = {**asdict(rung), **_what_decides(config, dataset_digest)}
    return config.model_copy(update={"run_id": f"ladder-{digest_of(decisive)[:16]}"})


def _what_decides(config: RunConfig, dataset_digest: str) -> dict[str, Any]:
    """The held-out loss: all that makes a run the run that it is (training/identity.py), of the data order its constants, and what is scored."""
    weights = {source.name: source.weight for source in config.corpus.sources}
    stages = [stage.model_dump(mode="json") for stage in config.corpus.mixture]
    order = {"mixture": stages or weights, **config.data.model_dump(include=ORDER)}
    scored = config.evaluation.model_dump(include={"sequence_length", "max_tokens_per_source"})
    return {"run": identity_of(config, dataset_digest, order), "evaluation": scored}


def parameters(model: ModelConfig) -> int:
    """That a token passes through, embedding and head included."""
    return active_parameters(model) + 2 * model.vocab_size * model.hidden_size


def flops(config: RunConfig) -> float:
    """Of the whole run."""
    return float(config.schedule.total_tokens * flops_per_token(config.model, config.training.sequence_length))
