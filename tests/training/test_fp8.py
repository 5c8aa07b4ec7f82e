"""A run whose experts multiply fp8 from its start to its end, from checkpoint to checkpoint, and into a branch."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.schema import RunConfig
from pipeline.training.trainer import TrainingStopped
from tests.training.make import Watched, tiny

FP8 = {"training__expert_products": "fp8"}


def trained(config: RunConfig, until: int | None = None) -> list[float]:
    """Losses of the steps of this start; `until`: it is asked to stop when so many were reported."""
    seen = Watched()
    stop = (lambda: len(seen.progress) >= until) if until is not None else (lambda: False)
    try:
        seen.train(config, should_stop=stop)
    except TrainingStopped:
        assert until is not None
    return seen.losses


def test_a_run_goes_on_with_the_same_bits_and_branches(tmp_path: Path) -> None:
    root = str(tmp_path)
    whole = trained(tiny(root, run_id="whole", steps=6, **FP8))
    assert len(whole) == 6
    parts = tiny(root, run_id="parts", steps=6, **FP8)
    first = trained(parts, until=2)
    assert 0 < len(first) < 6
    with pytest.raises(ValueError, match=r"training\.expert_products is None here and 'fp8' there"):
        trained(tiny(root, run_id="parts", steps=6))
    rest = trained(parts)
    assert first + rest == whole
    branch = {"training__start_from": "whole@4"}
    same, other = (
        trained(tiny(root, run_id=name, steps=6, **branch, **products))
        for name, products in (("same", FP8), ("other", {}))
    )
    assert same == whole[4:]
    assert other != whole[4:]
    assert other == pytest.approx(whole[4:], abs=1e-2)
