"""What prepare will take and what a run leaves in its storage, as arithmetic without torch.

    text        what the sources hold; where nobody has listed them, the least that meets training's demand within `max_epochs`
    tokens      text / 3.5 bytes for a vocabulary of a few thousand, / 4.5 for a hundred thousand and more (English and code)
    CPU time    text at 50 MB a second and core (benchmarks/README.md: 50 to 57, on cores that were never idle)
    dataset     2 or 4 bytes a token: documents and packed rows, which zstd takes to about half of that each (the demo: 1.02 in all)
    checkpoint  parameters and optimizer state in fp32: Muon's momentum for matrices (bf16 if it is kept so), AdamW's two moments for the rest
    model       the published weights in `publishing.dtype`

Filters, duplicates and compressed sources make all but the last two estimates; they are told as such.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.config.schema import MixtureStage, RunConfig
from pipeline.model.shapes import parameter_shapes
from pipeline.optim.schedule import total_steps
from pipeline.planner.sizes import FP32, momentum_itemsize, sizes_of
from pipeline.training.retention import named_steps

TEXT_BYTES_A_SECOND = 50e6  # of one core
SMALL_VOCABULARY = 2**16  # token ids to here take 2 bytes


@dataclass(frozen=True)
class Preparing:
    text_bytes: int
    tokens: int
    cpu_seconds: float
    dataset_bytes: int


def preparing(config: RunConfig, text_bytes: int | None = None) -> Preparing:
    """Of sources that hold so much text; None: of the least that training needs."""
    small = config.model.vocab_size <= SMALL_VOCABULARY
    bytes_a_token = 3.5 if small else 4.5
    if text_bytes is None:
        least = sum(demand(config, source.name) / source.max_epochs for source in config.corpus.sources)
        text_bytes = round(least * bytes_a_token)
    tokens = round(text_bytes / bytes_a_token)
    return Preparing(text_bytes, tokens, text_bytes / TEXT_BYTES_A_SECOND, tokens * (2 if small else 4))


def demand(config: RunConfig, source: str) -> float:
    """Tokens of the whole run that come from a source, by the mixture's weights."""
    total, before, found = config.schedule.total_tokens, 0, 0.0
    weights = {each.name: each.weight for each in config.corpus.sources}
    for stage in config.corpus.mixture or (MixtureStage(until_tokens=total, weights=weights),):
        share = stage.weights.get(source, 0.0) / sum(stage.weights.values())
        found += share * (min(stage.until_tokens, total) - min(before, total))
        before = stage.until_tokens
    return found


def checkpoint_bytes(config: RunConfig) -> int:
    sizes = sizes_of(parameter_shapes(config.model))
    by_adamw = sizes.by_adamw(config.optimizer)
    by_muon = sizes.total - by_adamw
    return FP32 * (sizes.total + 2 * by_adamw) + momentum_itemsize(config.optimizer) * by_muon


def checkpoints_kept(config: RunConfig) -> int:
    """The most that the run's storage holds between two saves (training/retention.py): the newest, those that stay for good, and with
    `evaluation.follow` those that may wait for a result. Raises ConfigError for a mean of more than the run takes."""
    every, steps = config.checkpoint.every_steps, total_steps(config.schedule, config.training.sequence_length)
    named = {step for step in named_steps(config) if step != steps}  # the last one is among the newest
    taken = len({step for step in named if step % every}) + -(-steps // every)
    for_good = 0 if config.checkpoint.keep_every is None else steps // math.lcm(config.checkpoint.keep_every, every)
    waiting = config.evaluation.waiting if config.evaluation.follow else 0
    return min(taken, config.checkpoint.keep + for_good + len(named) + waiting)


def mean_bytes(config: RunConfig) -> int:
    """Of the mean of checkpoints, which has weights alone, in fp32; 0 without one."""
    return 0 if config.publishing.average_last is None else FP32 * sizes_of(parameter_shapes(config.model)).total


def model_bytes(config: RunConfig) -> int:
    return sizes_of(parameter_shapes(config.model)).total * (2 if config.publishing.dtype == "bf16" else FP32)
