"""One made run for the tests of this folder."""

from __future__ import annotations

import pytest
import torch

from tests.evaluation.make import MadeRun, make_run, run_config


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    torch.set_num_threads(1)
    return make_run(run_config(str(tmp_path_factory.mktemp("made"))))
