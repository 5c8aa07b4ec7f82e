"""The distributed step against `torch.optim.Muon` on gathered tensors: real gloo groups, equality to the bit."""

import pytest

from pipeline.optim.muon import overlap
from pipeline.parallel.exposed import Exposed
from tests.distributed import run_distributed
from tests.optim import ranks

pytestmark = pytest.mark.timeout(900)  # hundreds of small collectives: seconds, but minutes on a machine that is busy
LIMIT_S = 800


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Four ranks run their cases and leave a checkpoint that other world sizes read."""
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    run_distributed(ranks.four_ranks, 4, folder, timeout=LIMIT_S)
    return folder


def test_four_ranks(checkpoint):
    assert checkpoint


@pytest.mark.parametrize("wire", ["bf16", "fp32"])
@pytest.mark.parametrize("cases", [ranks.expert_cases, ranks.replicated_cases])
def test_whole_networks_on_four_ranks(cases, wire):
    run_distributed(cases, 4, wire, timeout=LIMIT_S)


@pytest.mark.parametrize("world", [2, 3])
def test_two_and_three_ranks(world, checkpoint):
    run_distributed({2: ranks.two_ranks, 3: ranks.three_ranks}[world], world, checkpoint, timeout=LIMIT_S)


def test_one_rank():
    run_distributed(ranks.one_rank, 1, timeout=LIMIT_S)


def test_exchanges_start_before_computations_and_two_at_a_time():
    log, flying = [], []

    class Handle:
        def __init__(self, name):
            self.name = name
            flying.append(name)
            assert len(flying) <= 2
            log.append(f"launch {name}")

        def wait(self):
            flying.remove(self.name)
            log.append(f"wait {self.name}")

    def exchange(name):
        yield Handle(f"{name} forth")
        yield Handle(f"{name} back")
        log.append(f"apply {name}")

    def computation(name):
        log.append(f"compute {name}")
        yield None
        log.append(f"finish {name}")

    overlap([exchange(n) for n in "abc"], [computation(n) for n in "xy"], Exposed())
    assert log[:4] == ["launch a forth", "launch b forth", "compute x", "finish x"]
    assert log.index("compute y") < log.index("wait b forth")
    assert [entry for entry in log if entry.startswith("apply")] == ["apply a", "apply b", "apply c"]
    assert not flying
