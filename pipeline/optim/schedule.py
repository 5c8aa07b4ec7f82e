"""Learning rate, batch size and bias rate as pure functions of the position.

The position counts slots: sequences so far times their length, whatever of it was padding (which `data.max_padding` keeps
to 2 %) or had no label. So does every `until_tokens`, and `schedule.total_tokens`.

A stage of a schedule holds from the end of the stage before it (or 0) until `until_tokens`. Nothing here is stateful:
resuming, changing the number of ranks or skipping a non-finite step cannot shift a schedule, and the 176 thousand steps
of the full run are arithmetic over its few stages of constant batch, never a loop over steps.

Conventions of one optimizer step that starts at position `slots` and consumes `n`:
- learning rate: the value at `slots + n`, so the first step of a warm-up from zero already moves and the last step of
  a stage has exactly the stage's `end`;
- global batch and bias rate: the stage that contains `slots` (a step never mixes two batch sizes; a stage therefore
  ends with the first step that reaches its `until_tokens`).

Source of the shapes: "Muon is Scalable for LLM Training" (arXiv 2502.16982), section 3.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.config.schema import LearningRateStage, ScheduleConfig


@dataclass(frozen=True)
class Segment:
    """Consecutive steps with the same global batch."""

    first_step: int
    first_sequence: int  # sequences consumed before first_step
    steps: int
    sequences: int  # per step


@dataclass(frozen=True)
class StepSettings:
    """Everything the schedules say about one optimizer step."""

    step: int  # counted from 0
    first_sequence: int  # global sequences consumed before it
    sequences: int  # its global batch
    slots_before: int  # position before it
    learning_rate: float
    bias_rate: float


def learning_rate(schedule: ScheduleConfig, slots: int) -> float:
    """Learning rate at position `slots`; past the last stage it stays at that stage's end."""
    begin = 0
    for stage in schedule.learning_rate:
        if slots <= stage.until_tokens:
            return _interpolate(stage, (slots - begin) / (stage.until_tokens - begin))
        begin = stage.until_tokens
    return _interpolate(schedule.learning_rate[-1], 1.0)


def global_batch(schedule: ScheduleConfig, slots: int) -> int:
    """Sequences of the step that starts at position `slots`."""
    stages = schedule.global_batch
    return next((stage.sequences for stage in stages if slots < stage.until_tokens), stages[-1].sequences)


def bias_rate(schedule: ScheduleConfig, slots: int) -> float:
    """Rate u of the router's selection-bias update in the step that starts at position `slots`."""
    stages = schedule.bias_rate
    return next((stage.rate for stage in stages if slots < stage.until_tokens), stages[-1].rate)


def segments(schedule: ScheduleConfig, sequence_length: int) -> tuple[Segment, ...]:
    """The run as stages of constant batch; the last step is whole, so a run may exceed `total_tokens` by part of a step."""
    found: list[Segment] = []
    step = sequence = 0
    for stage in schedule.global_batch:
        missing = min(stage.until_tokens, schedule.total_tokens) - sequence * sequence_length
        count = max(0, math.ceil(missing / (stage.sequences * sequence_length)))
        if count:
            found.append(Segment(step, sequence, count, stage.sequences))
        step += count
        sequence += count * stage.sequences
    return tuple(found)


def total_steps(schedule: ScheduleConfig, sequence_length: int) -> int:
    """Optimizer steps of the whole run."""
    last = segments(schedule, sequence_length)[-1]
    return last.first_step + last.steps


def steps_until(schedule: ScheduleConfig, sequence_length: int, slots: int) -> int:
    """Steps that have to be taken to reach position `slots` (at most the whole run)."""
    steps = 0
    for segment in segments(schedule, sequence_length):
        missing = slots - segment.first_sequence * sequence_length
        steps += min(segment.steps, max(0, math.ceil(missing / (segment.sequences * sequence_length))))
    return steps


def at_step(schedule: ScheduleConfig, sequence_length: int, step: int) -> StepSettings:
    """Settings of optimizer step `step` (from 0). Raises ValueError outside of the run."""
    for segment in segments(schedule, sequence_length):
        offset = step - segment.first_step
        if 0 <= offset < segment.steps:
            first = segment.first_sequence + offset * segment.sequences
            slots = first * sequence_length
            after = slots + segment.sequences * sequence_length
            return StepSettings(
                step, first, segment.sequences, slots, learning_rate(schedule, after), bias_rate(schedule, slots)
            )
    raise ValueError(f"step {step} is outside of the run, which has {total_steps(schedule, sequence_length)} steps")


def _interpolate(stage: LearningRateStage, fraction: float) -> float:
    """From `start` at fraction 0 to `end` at 1; both edges exact."""
    if stage.shape == "constant" or fraction <= 0.0:
        return stage.start
    if fraction >= 1.0:
        return stage.end
    if stage.shape == "linear":
        return stage.start + (stage.end - stage.start) * fraction
    return stage.end + (stage.start - stage.end) * 0.5 * (1.0 + math.cos(math.pi * fraction))
