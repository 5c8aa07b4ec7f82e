"""The distributed step against `torch.optim.Muon` on gathered tensors: real gloo groups, equality to the bit."""

import pytest

from tests.distributed import run_distributed
from tests.optim import ranks


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Four ranks run their cases and leave a checkpoint that other world sizes read."""
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    run_distributed(ranks.four_ranks, 4, folder, timeout=200)
    return folder


def test_four_ranks(checkpoint):
    assert checkpoint


@pytest.mark.parametrize("world", [2, 3])
def test_two_and_three_ranks(world, checkpoint):
    run_distributed({2: ranks.two_ranks, 3: ranks.three_ranks}[world], world, checkpoint, timeout=200)
