"""What a user reads when workers fail is one line."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from jobs import stage
from jobs.on_ray.failed import WorkersFailed, told


def wrapped(error: Exception) -> UserExceptionWithTraceback:
    return UserExceptionWithTraceback(error, "Traceback (most recent call last):\n ...")


def test_the_rank_that_met_the_storage_is_told() -> None:
    """Its peers only say that a connection was closed."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/runs/x")
    peer = RuntimeError("[gloo] a long story\nConnection closed by peer")
    error = WorkerGroupError("...", {0: wrapped(peer), 1: wrapped(full)})
    assert told(error, 3) == (
        "the workers failed, after 3 restarts (cluster.max_failures); rank 1: storage: [Errno 28] No space left on device: "
        "'/data/runs/x'; once it works again the same command goes on"
    )
    assert told(WorkerGroupError("...", {0: wrapped(peer)}), 0).endswith(
        "rank 0: RuntimeError: Connection closed by peer; run the same command to go on"
    )
    assert (
        told(ControllerError(ValueError("no\nnode")), 1)
        == "the workers failed: Training failed due to controller error: no node"
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (WorkersFailed("the workers failed: so and so"), "evaluate: the workers failed: so and so\n"),
        (OSError(errno.EIO, "Input/output error", "/x"), "evaluate: storage: [Errno 5] Input/output error: '/x'; once it works again the same command goes on\n"),
    ],
)  # fmt: skip
def test_a_stage_ends_with_one(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> NoReturn:
        raise error

    monkeypatch.setattr("jobs.stage.open_run", fail)
    assert stage.main("evaluate", ["--config", "debug", f"storage.root={tmp_path}"]) == 1
    assert capsys.readouterr().err == said
