"""Fixtures shared by all tests."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Two threads spin for each other on a busy machine, at many times the cost of these tiny networks."""
    torch.set_num_threads(1)
