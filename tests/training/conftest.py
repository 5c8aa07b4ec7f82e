"""One thread: two would spin for each other on a busy machine, at many times the cost of these tiny networks."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
