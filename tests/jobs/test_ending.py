"""What a stage's program says and ends with, by what stopped it."""

import signal

import pytest
from botocore.exceptions import NoCredentialsError

from jobs.drivers.ending import ENDINGS, ended
from jobs.on_ray.failed import WorkersFailed
from jobs.on_ray.signals import Interrupted
from pipeline.config.load import ConfigError
from pipeline.lease import LeaseLost
from pipeline.publishing.gate import GateError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LeaseLost("somebody else trains"), 3),
        (GateError("the gate is closed"), 4),
        (WorkersFailed("rank 1 ended"), 1),
        (OSError("the disk is full"), 1),
        (NoCredentialsError(), 1),
        (ConfigError("training.ep 3: no"), 2),
        (Interrupted(signal.SIGTERM), 143),
    ],
)
def test_one_line_and_an_exit_code(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(error, ENDINGS)
    assert ended("train", error) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train: ")
    assert str(error) in line
