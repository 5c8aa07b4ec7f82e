"""Buffers of fixed size decide how fast a run is, not what it learns: `training.expert_capacity`, down to the last bit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.manifest import DatasetManifest
from pipeline.parallel.bounded import Room
from pipeline.parallel.local import local_tensor
from pipeline.storage import Storage
from pipeline.training.metrics import StepRecord
from pipeline.training.room import FIRST_PAUSE, LONGEST_PAUSE, FixedRoom
from pipeline.training.trainer import Run
from tests.distributed import run_distributed
from tests.parallel.symmetric_gloo import symmetric_over_gloo
from tests.training.make import tiny, tiny_dataset

STEPS = 14
EP2 = {"parallelism": {"shard": 4, "ep": 2}, "optimizer": {"qk_clip": 0.02}}
Outcome = tuple[list[StepRecord], dict[str, Tensor], int]


def trained(
    root: str, dataset: DatasetManifest, capacity: float | None, *, broken_at: int | None = None, **more: object
) -> Outcome:
    """Figures, this rank's state, and how many steps were computed twice. `broken_at`: a step with NaN for a weight."""
    config = tiny(root, steps=STEPS, training__expert_capacity=capacity, **EP2, **more)
    run = Run(config, dataset, Storage(config.storage))
    records = []
    weight = local_tensor(run.model.norm.weight)
    for step in range(1, STEPS + 1):
        before = weight.detach().clone()
        if step == broken_at:
            weight.data.fill_(math.nan)
        records.append(run.advance(False).fetch())
        if step == broken_at:
            weight.data.copy_(before)
    run.close()
    records = [replace(record, times=()) for record in records]
    fixed = run.step.fixed_room
    state = {name: local_tensor(t).clone() for name, t in run.state().items()}
    return records, state, 0 if fixed is None else fixed.repeated


def both_ways(root: str, dataset: DatasetManifest) -> list[tuple[Outcome, Outcome]]:
    small = {"training__micro_batch": 1, "training__gather_once": True}
    found = [
        (trained(root, dataset, capacity, **more), trained(root, dataset, None, **more))
        for capacity, more in (
            (1.0, {}),  # the first step has no room: all but that one take buffers that fit
            (1.2, small),
            (4.0, {"training__activation_checkpointing": "full"}),  # there is always room
        )
    ]
    with symmetric_over_gloo() as wires:  # what a rank gets is bounded in all, not from each
        found.append((trained(root, dataset, 1.1, **small), found[1][1]))
        sent = wires.bytes_sent
        found.append((trained(root, dataset, 4.0, training__activation_checkpointing="full"), found[2][1]))
        assert wires.bytes_sent > sent
    return found


@pytest.mark.timeout(600)
def test_the_bits_of_a_run_without_the_setting(tmp_path):
    dataset = tiny_dataset(Storage(tiny(str(tmp_path)).storage))
    by_rank = run_distributed(both_ways, 4, str(tmp_path), dataset, timeout=500)
    for cases in by_rank:
        for (records, state, _), (expected, expected_state, _) in cases:
            assert records == expected
            assert state.keys() == expected_state.keys()
            for name, tensor in expected_state.items():
                assert torch.equal(state[name], tensor), name
    repeated = [[fixed[2] for fixed, _ in cases] for cases in by_rank]
    assert all(each == repeated[0] for each in repeated)
    assert [times > 0 for times in repeated[0]] == [True, True, False, True, False]


def broken(root: str, dataset: DatasetManifest) -> tuple[Outcome, Outcome]:
    options = {"broken_at": 3, "training__max_skipped_steps": 5}
    return trained(root, dataset, 4.0, **options), trained(root, dataset, None, **options)


@pytest.mark.timeout(600)
def test_a_step_without_a_loss_is_tried_once_more_and_counted_once(tmp_path):
    dataset = tiny_dataset(Storage(tiny(str(tmp_path)).storage))
    for (records, _, repeated), (expected, _, _) in run_distributed(broken, 4, str(tmp_path), dataset, timeout=500):
        assert repeated == 1
        assert [r.skipped_steps for r in records] == [r.skipped_steps for r in expected] == [0] * 2 + [1] * (STEPS - 2)
        assert [r.loss for r in records[3:]] == [r.loss for r in expected[3:]]


def test_the_pauses():
    room, yes, no = Room(1.5), torch.tensor(True), torch.tensor(False)
    fixed = FixedRoom(room)

    def steps_until_fixed() -> int:
        taken = 0
        while not fixed.begin():
            assert not room.fixed
            taken += 1
        assert room.fixed
        return taken

    assert steps_until_fixed() == 0
    assert fixed.sufficed(yes)
    assert steps_until_fixed() == 0
    pause = FIRST_PAUSE
    for _ in range(10):
        assert not fixed.sufficed(no)
        assert not room.fixed
        assert steps_until_fixed() == pause
        pause = min(2 * pause, LONGEST_PAUSE)
    assert fixed.sufficed(yes)
    assert steps_until_fixed() == 0
    assert not fixed.sufficed(no)
    assert steps_until_fixed() == FIRST_PAUSE
    assert fixed.repeated == 11
