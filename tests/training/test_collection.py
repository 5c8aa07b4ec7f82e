"""The collector runs at the steps that are due and no others, and a step has no need of it."""

import gc

import pytest
import torch

from pipeline.training.collection import collecting
from tests.model.oracle import random_model, small_config


@pytest.fixture
def thawed():
    """Nothing is frozen, as in a process that trains."""
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.fixture
def collections():
    """Generations collected so far."""
    seen: list[int] = []

    def watch(phase: str, facts: dict[str, int]) -> None:
        if phase == "start":
            seen.append(facts["generation"])

    gc.callbacks.append(watch)
    yield seen
    gc.callbacks.remove(watch)


def test_it_runs_at_multiples_of_its_steps(thawed, collections):
    with collecting(3) as after:
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 1000
        del collections[:]
        for step in range(1, 8):
            for _ in range(2000):  # more than it takes to start one
                cycle: list = []
                cycle.append(cycle)
            after(step)
            assert collections == [1] * (step // 3)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_what_was_frozen_stays_frozen(thawed):
    gc.freeze()
    with collecting(3):
        pass
    assert gc.get_freeze_count() > 1000


def test_without_a_number_python_decides():
    with collecting(None) as after:
        assert gc.isenabled()
        after(1)


def test_what_was_off_stays_off():
    gc.disable()
    try:
        with pytest.raises(KeyError), collecting(1):
            raise KeyError
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_step_leaves_no_tensor_in_a_cycle(mode):
    model = random_model(small_config())
    ids_BS = torch.randint(0, 96, (2, 24))
    for block in model.layers:
        block.activation_checkpointing = mode
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        model(ids_BS, ids_BS).loss_sum.backward()
        model.zero_grad()
        gc.collect()
        assert not [found for found in gc.garbage if isinstance(found, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
