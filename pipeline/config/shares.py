"""`until: 80%` of a stage becomes its `until_tokens`, before anything else looks at the values of a run."""

from __future__ import annotations

from typing import Any

from pipeline.config.values import LARGEST, parse_share

LISTS = (("schedule", "learning_rate"), ("schedule", "global_batch"), ("schedule", "bias_rate"), ("corpus", "mixture"))


FEWEST = 100  # tokens that have shares


def with_tokens(values: Any) -> Any:
    """The values of a run (as read from YAML) with every share replaced. Raises ValueError naming the stage.

    Of values that are wrong otherwise the schema speaks: this changes nothing it would not understand.
    """
    schedule = values.get("schedule") if isinstance(values, dict) else None
    if not isinstance(schedule, dict):
        return values
    total: Any = schedule.get("total_tokens")
    if not isinstance(total, int) or isinstance(total, bool) or not 0 < total <= LARGEST:
        total = 10**12  # stands in for what the schema refuses
    for section, name in LISTS:
        stages = values[section].get(name) if isinstance(values.get(section), dict) else None
        if not isinstance(stages, list):
            continue
        resolved = [_resolved(stage, total, f"{section}.{name}[{at}]") for at, stage in enumerate(stages)]
        values = {**values, section: {**values[section], name: resolved}}
    return values


def _resolved(stage: Any, total: int, key: str) -> Any:
    if not isinstance(stage, dict) or "until" not in stage:
        return stage
    if "until_tokens" in stage:
        raise ValueError(f"{key}: until and until_tokens are two answers to one question; give one")
    if total < FEWEST:
        raise ValueError(f"schedule.total_tokens {total} is less than one step; raise it")
    try:
        return {"until_tokens": parse_share(stage["until"], total), **{k: v for k, v in stage.items() if k != "until"}}
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
