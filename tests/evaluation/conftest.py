"""One made run for the tests of this folder."""

from __future__ import annotations

import pytest
import torch

from tests.evaluation.make import MadeRun, make_run, run_config
from tests.publishing.conftest import PublishedRun, published


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    torch.set_num_threads(1)
    return make_run(run_config(str(tmp_path_factory.mktemp("made"))))


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> PublishedRun:
    """A published one, for lm-eval's own model to load."""
    torch.set_num_threads(1)
    return published(str(tmp_path_factory.mktemp("harness")))
