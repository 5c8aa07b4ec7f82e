"""The test utility itself: results in rank order, failures with their traceback, a hard end."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_distributed


def _sum_of_ranks(offset: int) -> tuple[int, float, int]:
    value = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(value)
    return dist.get_rank(), value.item(), torch.get_num_threads()


def _fails_on_one_rank() -> None:
    if dist.get_rank() == 1:
        raise KeyError("lost on purpose")
    dist.barrier()  # never completed by rank 1


def _sleeps() -> None:
    time.sleep(60)


def test_results_come_back_in_rank_order():
    assert run_distributed(_sum_of_ranks, 2, 10) == [(0, 21.0, 1), (1, 21.0, 1)]


def test_a_failing_rank_is_named_and_ends_the_others():
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed.*KeyError: 'lost on purpose'"):
        run_distributed(_fails_on_one_rank, 2, timeout=60)


def test_a_hanging_rank_ends_at_the_timeout():
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 1"):
        run_distributed(_sleeps, 1, timeout=8)
